// gptq_sweep
