//! What `aespa-gpu verify` and `aespa-gpu eval` do with a model, and what must hold however hostile it is.

use aespa_gpu::calib::Streaming;
use aespa_gpu::engine::{DeviceChoice, open};
use aespa_gpu::eval::evaluate;
use aespa_gpu::export::{self, Reader};
use aespa_gpu::model::ModelSpec;
use aespa_gpu::plan::{EvalRequest, EvalText, TextSource, check_shapes};
use aespa_gpu::text::Tokenizer;
use aespa_gpu::{Error, Kind, Result};
use std::path::Path;

/// Before the first input.
pub fn prepare() {
    // One thread: inputs are small, and many processes may run side by side.
    rayon::ThreadPoolBuilder::new().num_threads(1).build_global().expect("no pool has been made before");
    // libFuzzer's hook ends the process at every panic. Those of the `tokenizers` crate are caught and become errors; what is caught nowhere
    // still ends it.
    std::panic::set_hook(Box::new(|panic| {
        if panic.location().is_none_or(|at| !at.file().contains("tokenizers")) {
            eprintln!("{panic}\n{}", std::backtrace::Backtrace::force_capture());
            std::process::abort();
        }
    }));
}

/// Verifies and evaluates the model at `path`, whose tokenizer and text are in `folder`. Any error will do but one that says that the program
/// is broken.
pub fn run(path: &Path, folder: &Path) {
    let verified = export::verify(path);
    let read = export::open_packed(path).and_then(|reader| {
        read_all(reader.as_ref())?;
        Ok(reader)
    });
    // What is verified can be read.
    if let (Ok(_), Err(e)) = (&verified, &read) {
        panic!("verified, but not read: {e}");
    }
    expected(verified);
    if let Some(reader) = expected(read)
        && is_tiny(reader.spec())
    {
        expected(judge(reader.as_ref(), folder));
    }
}

fn expected<T>(result: Result<T>) -> Option<T> {
    if let Err(Error { kind: Kind::Internal, subject, message, .. }) = &result {
        panic!("an internal error: {subject}: {message}");
    }
    result.ok()
}

fn read_all(reader: &dyn Reader) -> Result<()> {
    for linear in reader.spec().matrices() {
        let packed = reader.packed(linear)?;
        assert_eq!(packed.as_ref().map(|p| p.lattice), reader.lattice(linear)?, "{}", linear.module);
        let values = reader.linear(linear)?;
        assert_eq!(values.shape, [linear.d_out, linear.d_in]);
        reader.fingerprint(linear)?;
    }
    for tensor in reader.spec().tensors().iter().filter(|t| !t.quantizable) {
        assert_eq!(reader.tensor(&tensor.name)?.shape, tensor.shape);
    }
    Ok(())
}

fn is_tiny(spec: &ModelSpec) -> bool {
    spec.n_layer <= 4 && spec.matrices().map(|l| l.d_in.saturating_mul(l.d_out)).fold(0, usize::saturating_add) < 1 << 18
}

/// As `cli::eval`, on one short window.
fn judge(reader: &dyn Reader, folder: &Path) -> Result<()> {
    check_shapes(reader.spec(), folder)?;
    let text = TextSource::File(folder.join("text.txt"));
    let request = EvalRequest { text, window: Some(reader.spec().max_positions.min(8)), windows: Some(1) };
    let text = EvalText::new(&request, &Tokenizer::open(folder)?, reader.spec())?;
    let mut engine = open(&DeviceChoice::Cpu)?;
    let judged = evaluate::<f32>(engine.as_mut(), reader, None, &text.windows(), &Streaming::default(), &mut |_, _| Ok(()))?;
    assert!(judged.loss.is_finite());
    Ok(())
}
