// kl_divergence
