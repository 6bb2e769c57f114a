//! The model inside the program, so that a first run needs no download. Provenance and terms: assets/README.md.

use crate::{Error, Result};
use std::io::Write;
use std::path::Path;

/// The files of the demo's folder: name and content.
pub const DEMO_FILES: &[(&str, &[u8])] = &[
    ("config.json", include_bytes!("../../assets/demo/config.json")),
    ("generation_config.json", include_bytes!("../../assets/demo/generation_config.json")),
    ("model.safetensors", include_bytes!("../../assets/demo/model.safetensors")),
    ("tokenizer.json", include_bytes!("../../assets/demo/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../../assets/demo/tokenizer_config.json")),
];

/// Writes the demo's files into `dir`, which is made if need be. A file that is there with the right content is left alone; another
/// one is replaced in one step, so that a run that has it open keeps what it had.
pub fn unpack_demo(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|e| Error::output(dir.display(), "cannot be made").caused_by(e))?;
    for (name, content) in DEMO_FILES {
        let path = dir.join(name);
        if std::fs::read(&path).is_ok_and(|there| there == *content) {
            continue;
        }
        let write = || -> std::io::Result<()> {
            let mut file = readable_by_all().tempfile_in(dir)?;
            file.write_all(content)?;
            file.persist(&path)?;
            Ok(())
        };
        write().map_err(|e| Error::output(path.display(), "cannot be written").caused_by(e))?;
    }
    Ok(())
}

/// Temporary files are private by default; what is unpacked is no secret. The user's umask applies.
fn readable_by_all() -> tempfile::Builder<'static, 'static> {
    #[allow(unused_mut, reason = "permissions are a Unix matter")]
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Checkpoint;
    use crate::tensor::Dtype;

    #[test]
    fn the_demo_unpacks_repairs_itself_and_opens() {
        let dir = tempfile::tempdir().unwrap();
        unpack_demo(dir.path()).unwrap();
        std::fs::write(dir.path().join("config.json"), "{").unwrap();
        unpack_demo(dir.path()).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let spec = checkpoint.spec();
        assert_eq!((spec.d_model, spec.n_head, spec.n_kv, spec.d_head, spec.d_ff), (256, 4, 2, 64, 768));
        assert_eq!((spec.dtype, spec.tied_head, spec.n_vocab), (Dtype::F16, true, 2048));
        for tensor in spec.tensors() {
            assert_eq!(checkpoint.tensor(&tensor.name).unwrap().shape, tensor.shape);
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), DEMO_FILES.len());
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_an_output_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(unpack_demo(&file.path().join("x")).unwrap_err().kind, crate::Kind::Output);
    }
}
