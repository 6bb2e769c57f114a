//! Where an output folder may be, and what is left when it cannot be written: nothing.

mod common;

use aespa_gpu::export::{self, FORMATS, Writer};
use aespa_gpu::model::Checkpoint;
use aespa_gpu::quant::Scheme;
use aespa_gpu::{Error, Kind};
use common::rtn;
use common::tiny_model::TinyLlama;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

fn scheme() -> Scheme {
    Scheme::new(4, -1, true).unwrap()
}

fn model(dir: &Path) -> Checkpoint {
    TinyLlama::default().write(dir);
    Checkpoint::open(dir).unwrap()
}

fn create(out: &Path, overwrite: bool, checkpoint: &Checkpoint) -> Result<Writer, Error> {
    Writer::create(out, overwrite, FORMATS[0], checkpoint, scheme())
}

fn write(out: &Path, overwrite: bool, checkpoint: &Checkpoint, extra: &[(&str, &[u8])]) -> Result<(), Error> {
    let mut writer = create(out, overwrite, checkpoint)?;
    rtn::quantize_model(
        checkpoint,
        |linear| (!linear.is_outer()).then(|| scheme().lattice(checkpoint.spec().dtype)),
        |linear, packed| writer.put_linear(checkpoint.spec(), linear, &packed),
    )?;
    let staged = writer.complete(checkpoint)?;
    staged.verify()?;
    staged.publish(extra)
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn refused(result: Result<Writer, Error>, kind: Kind, words: &str) {
    let e = result.map(|_| ()).unwrap_err();
    assert!(e.kind == kind && e.to_string().contains(words), "{e}");
}

#[test]
fn an_existing_folder_is_replaced_only_when_asked_and_only_a_model() {
    let root = tempfile::tempdir().unwrap();
    let checkpoint = model(&root.path().join("model"));
    let out = root.path().join("out");
    write(&out, false, &checkpoint, &[("old.json", b"1")]).unwrap();
    refused(create(&out, false, &checkpoint), Kind::Usage, "--overwrite");

    // Until it is published, the old folder is whole; a run that fails leaves it so.
    let writer = create(&out, true, &checkpoint).unwrap();
    assert!(out.join("old.json").exists());
    drop(writer);
    export::open(&out).unwrap();
    write(&out, true, &checkpoint, &[("new.json", b"1")]).unwrap();
    assert!(!out.join("old.json").exists() && out.join("new.json").exists());
    assert_eq!(names(root.path()), ["model", "out"]);

    let photos = root.path().join("photos");
    fs::create_dir(&photos).unwrap();
    refused(create(&photos, false, &checkpoint), Kind::Usage, "exists");
    drop(create(&photos, true, &checkpoint).unwrap());
    fs::write(photos.join("cat.jpg"), "meow").unwrap();
    refused(create(&photos, true, &checkpoint), Kind::Usage, "no model folder");
    refused(create(&photos.join("cat.jpg"), true, &checkpoint), Kind::Usage, "not a folder");
    assert_eq!(names(&photos), ["cat.jpg"]);
    assert_eq!(names(root.path()), ["model", "out", "photos"]);
}

#[test]
fn a_folder_that_appears_meanwhile_is_not_overwritten() {
    let root = tempfile::tempdir().unwrap();
    let checkpoint = model(&root.path().join("model"));
    let out = root.path().join("out");
    let mut writer = create(&out, false, &checkpoint).unwrap();
    rtn::quantize_model(
        &checkpoint,
        |linear| (!linear.is_outer()).then(|| scheme().lattice(checkpoint.spec().dtype)),
        |linear, packed| writer.put_linear(checkpoint.spec(), linear, &packed),
    )
    .unwrap();
    let staged = writer.complete(&checkpoint).unwrap();
    fs::create_dir(&out).unwrap();
    assert_eq!(staged.publish(&[]).unwrap_err().kind, Kind::Usage);
    assert_eq!(names(root.path()), ["model", "out"]);
}

#[test]
fn the_model_itself_is_out_of_reach() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("a/model");
    let checkpoint = model(&dir);
    fs::write(root.path().join("a/config.json"), "{}").unwrap();
    refused(create(&dir, true, &checkpoint), Kind::Usage, "is the model itself");
    refused(create(&dir.join("."), true, &checkpoint), Kind::Usage, "is the model itself");
    refused(create(&dir.join("quantized"), false, &checkpoint), Kind::Usage, "inside");
    refused(create(&root.path().join("a"), true, &checkpoint), Kind::Usage, "holds the model");
    #[cfg(unix)]
    {
        let link = root.path().join("link");
        std::os::unix::fs::symlink(&dir, &link).unwrap();
        refused(create(&link, true, &checkpoint), Kind::Usage, "is the model itself");
        // A folder of links, as download caches have them: its files are elsewhere.
        let cache = root.path().join("cache");
        fs::create_dir(&cache).unwrap();
        names(&dir).iter().for_each(|n| std::os::unix::fs::symlink(dir.join(n), cache.join(n)).unwrap());
        let linked = Checkpoint::open(&cache).unwrap();
        refused(create(&root.path().join("a"), true, &linked), Kind::Usage, "holds the model");
        let out = root.path().join("out");
        write(&out, false, &linked, &[]).unwrap();
        assert!(fs::read_dir(&out).unwrap().all(|e| e.unwrap().file_type().unwrap().is_file()));
    }
    assert_eq!(names(&dir), ["config.json", "model.safetensors"]);
}

#[test]
fn unwritable_places_are_output_errors() {
    let root = tempfile::tempdir().unwrap();
    let checkpoint = model(&root.path().join("model"));
    let file = root.path().join("file");
    fs::write(&file, "").unwrap();
    // Root may write anywhere it has permission to forbid: these hold for everyone.
    refused(create(&file.join("out"), false, &checkpoint), Kind::Output, "file");
    refused(create(&root.path().join("no/such/out"), false, &checkpoint), Kind::Output, "make it first");
    #[cfg(target_os = "linux")]
    refused(create(Path::new("/proc/out"), false, &checkpoint), Kind::Output, "/proc");
    refused(create(&root.path().join(".."), false, &checkpoint), Kind::Usage, "holds the model");
}

#[test]
fn groups_must_divide_before_anything_is_made() {
    let root = tempfile::tempdir().unwrap();
    let checkpoint = model(&root.path().join("model"));
    let scheme = Scheme::new(4, 32, true).unwrap();
    refused(Writer::create(&root.path().join("out"), false, FORMATS[0], &checkpoint, scheme), Kind::Usage, "--group-size");
    assert_eq!(names(root.path()), ["model"]);
}

/// A mounted tmpfs, unmounted when dropped; `None` where this is not permitted.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn mount(kib: usize) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mut command = std::process::Command::new("mount");
        let status = command.args(["-t", "tmpfs", "-o", &format!("size={kib}k"), "tmpfs"]).arg(dir.path()).output();
        match status {
            Ok(output) if output.status.success() => Some(Self(dir)),
            other => {
                eprintln!("SKIPPED: a small disk cannot be mounted here: {other:?}");
                None
            }
        }
    }

    fn out(&self) -> PathBuf {
        self.0.path().join("out")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_disk_is_a_clear_error_at_once_and_at_the_end() {
    let root = tempfile::tempdir().unwrap();
    let checkpoint = model(&root.path().join("model"));
    let Some(small) = SmallDisk::mount(512) else { return };
    refused(create(&small.out(), false, &checkpoint), Kind::Output, "the disk is full");
    assert!(names(small.0.path()).is_empty());

    let Some(enough) = SmallDisk::mount(2048) else { return };
    // The reserved weights fit; what comes last does not.
    let large = vec![1; 4 << 20];
    let e = write(&enough.out(), false, &checkpoint, &[("report.json", &large)]).unwrap_err();
    assert!(e.kind == Kind::Output && e.to_string().contains("the disk is full") && e.subject.contains("report.json"), "{e}");
    assert!(names(enough.0.path()).is_empty());
    // Others may take the space while the run computes: the weights have theirs, the small files at the end have not.
    let mut writer = create(&enough.out(), false, &checkpoint).unwrap();
    let ballast = enough.0.path().join("ballast");
    assert_eq!(fs::write(&ballast, &large).unwrap_err().kind(), std::io::ErrorKind::StorageFull);
    rtn::quantize_model(
        &checkpoint,
        |linear| (!linear.is_outer()).then(|| scheme().lattice(checkpoint.spec().dtype)),
        |linear, packed| writer.put_linear(checkpoint.spec(), linear, &packed),
    )
    .unwrap();
    let e = writer.complete(&checkpoint).unwrap_err();
    assert!(e.kind == Kind::Output && e.to_string().contains("the disk is full"), "{e}");
    assert_eq!(names(enough.0.path()), ["ballast"]);
    fs::remove_file(ballast).unwrap();
    write(&enough.out(), false, &checkpoint, &[]).unwrap();
}
