//! What a run has done so far, kept beside its OUT, so that the same command goes on where a killed one was.
//!
//! The hidden folder `.NAME.aespa-gpu.unfinished` holds all that a run has written, and the file `journal`: one line per record, SHA-256 and
//! JSON. The first says what the run is, each later one what a step has made; a line that is cut off or damaged ends it. Records are durable
//! when [`Journal::append`] comes back, so a record must come after what it tells of. A lock on the file keeps two runs apart.
//!
//! A folder without a step goes with its journal: there is nothing in it to go on with.

use crate::{Error, Result};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

const FILE: &str = "journal";
/// Hexadecimal digits of a record's hash.
const HASH: usize = 64;

/// The records of one unfinished run, locked.
#[derive(Debug)]
pub struct Journal {
    folder: PathBuf,
    file: File,
    /// What the run is, and what each step has made; with the end of each record in the file.
    records: Vec<(Value, u64)>,
}

impl Journal {
    /// Opens that of the unfinished run whose OUT is `out`, or begins a new one. `restart`: what is there is thrown away.
    ///
    /// # Errors
    /// Usage, if another run is at work there; output, if the folder cannot be made.
    pub fn open(out: &Path, restart: bool) -> Result<Self> {
        let folder = folder_of(out);
        let cannot = |e| Error::output(folder.display(), "cannot be written").caused_by(e);
        fs::create_dir_all(&folder).map_err(cannot)?;
        let path = folder.join(FILE);
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(cannot)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::usage(out.display(), "is being written by another run")),
            // Where files cannot be locked, as on some network disks, users must keep runs apart.
            Err(TryLockError::Error(e)) => tracing::debug!("{}: {e}", path.display()),
        }
        let mut text = Vec::new();
        file.read_to_end(&mut text).map_err(cannot)?;
        let mut journal = Self { folder, file, records: if restart { Vec::new() } else { records(&text) } };
        if journal.steps().len() == 0 {
            journal.clear()?;
        }
        let steps = journal.steps().len();
        journal.cut(steps)?;
        Ok(journal)
    }

    /// Where the run writes.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What was made so far, in order.
    pub fn steps(&self) -> impl ExactSizeIterator<Item = &Value> {
        self.records.iter().skip(1).map(|(step, _)| step)
    }

    /// Says what the run is, or checks that it is the one that is to go on.
    ///
    /// # Errors
    /// Usage, naming what differs; output, if it cannot be written.
    pub fn begin(&mut self, identity: &Value) -> Result<()> {
        let Some((before, _)) = self.records.first() else { return self.append(identity.clone()) };
        let mut differences = Vec::new();
        compare("", before, identity, &mut differences);
        if differences.is_empty() {
            return Ok(());
        }
        let message = format!(
            "holds an unfinished run with other settings: {}; repeat that run's command to go on with it, or add --restart to begin anew",
            differences.join(", ")
        );
        Err(Error::usage(self.folder.display(), message))
    }

    /// Adds a record.
    ///
    /// # Errors
    /// Output, if it cannot be written; the journal is as it was then.
    pub fn append(&mut self, record: Value) -> Result<()> {
        let json = record.to_string();
        let line = format!("{} {json}\n", hash(json.as_bytes()));
        let start = self.end();
        let file = &mut self.file;
        let written = file.seek(SeekFrom::Start(start)).and_then(|_| file.write_all(line.as_bytes())).and_then(|()| file.sync_data());
        written.map_err(|e| {
            let what =
                if e.kind() == std::io::ErrorKind::StorageFull { "cannot be written: the disk is full" } else { "cannot be written" };
            Error::output(self.folder.join(FILE).display(), what).caused_by(e)
        })?;
        self.records.push((record, start + line.len() as u64));
        Ok(())
    }

    /// Keeps the first steps only.
    pub fn cut(&mut self, steps: usize) -> Result<()> {
        self.records.truncate(steps + 1);
        let end = self.end();
        self.file.set_len(end).map_err(|e| Error::output(self.folder.join(FILE).display(), "cannot be shortened").caused_by(e))
    }

    /// Throws away everything but the journal itself, and its records.
    pub fn clear(&mut self) -> Result<()> {
        let cannot = |e| Error::output(self.folder.display(), "cannot be emptied").caused_by(e);
        for entry in fs::read_dir(&self.folder).map_err(cannot)? {
            let entry = entry.map_err(cannot)?;
            if entry.file_name() == FILE {
                continue;
            }
            let path = entry.path();
            let removed = if entry.file_type().is_ok_and(|kind| kind.is_dir()) { fs::remove_dir_all(path) } else { fs::remove_file(path) };
            removed.map_err(cannot)?;
        }
        self.records.clear();
        self.file.set_len(0).map_err(cannot)
    }

    /// The run is over: the folder goes.
    pub fn finish(mut self) {
        self.records.clear();
    }

    /// The end of the last record in the file.
    fn end(&self) -> u64 {
        self.records.last().map_or(0, |(_, end)| *end)
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        if self.steps().len() == 0
            && let Err(e) = fs::remove_dir_all(&self.folder)
        {
            tracing::warn!("{} cannot be removed: {e}", self.folder.display());
        }
    }
}

/// Where a run with this OUT keeps what it writes.
fn folder_of(out: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(out.file_name().unwrap_or_default());
    name.push(concat!(".", env!("CARGO_PKG_NAME"), ".unfinished"));
    out.with_file_name(name)
}

/// The whole records at the start of a journal, each with its end.
fn records(text: &[u8]) -> Vec<(Value, u64)> {
    let mut all = Vec::new();
    let mut end = 0;
    for line in text.split_inclusive(|b| *b == b'\n') {
        end += line.len() as u64;
        let Some((hashed, json)) = line.strip_suffix(b"\n").and_then(|line| line.split_at_checked(HASH)) else { break };
        let Some(json) = json.strip_prefix(b" ").filter(|json| hash(json).as_bytes() == hashed) else { break };
        let Ok(record) = serde_json::from_slice(json) else { break };
        all.push((record, end));
    }
    all
}

fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// Lists where two records differ, by the names of their members.
fn compare(name: &str, before: &Value, now: &Value, differences: &mut Vec<String>) {
    match (before, now) {
        (Value::Object(before), Value::Object(now)) => {
            for key in before.keys().chain(now.keys().filter(|key| !before.contains_key(*key))) {
                let name = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
                compare(&name, before.get(key).unwrap_or(&Value::Null), now.get(key).unwrap_or(&Value::Null), differences);
            }
        }
        _ if before != now => differences.push(format!("{name} was {before} and is {now}")),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn names(journal: &Journal) -> Vec<u64> {
        journal.steps().map(|step| step["n"].as_u64().unwrap()).collect()
    }

    /// A journal with an identity and three steps.
    fn three_steps(out: &Path) -> PathBuf {
        let mut journal = Journal::open(out, false).unwrap();
        journal.begin(&json!({"bits": 3, "method": {"name": "gptq"}})).unwrap();
        (0..3).for_each(|n| journal.append(json!({"n": n})).unwrap());
        fs::write(journal.folder().join("work"), "x").unwrap();
        journal.folder().to_owned()
    }

    #[test]
    fn steps_come_back_up_to_the_first_damage() {
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("out");
        let folder = three_steps(&out);
        let whole = fs::read(folder.join(FILE)).unwrap();
        for len in (0..=whole.len()).rev() {
            fs::write(folder.join(FILE), &whole[..len]).unwrap();
            let journal = Journal::open(&out, false).unwrap();
            let want = whole[..len].iter().filter(|b| **b == b'\n').count().saturating_sub(1) as u64;
            assert_eq!(names(&journal), (0..want).collect::<Vec<_>>(), "{len} bytes");
            assert_eq!(folder.join("work").exists(), want > 0, "what no step tells of is thrown away");
            if want == 0 {
                break;
            }
        }
        let mut damaged = whole.clone();
        let at = whole.len() - 3;
        damaged[at] ^= 1;
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(FILE), damaged).unwrap();
        let mut journal = Journal::open(&out, false).unwrap();
        assert_eq!(names(&journal), [0, 1]);
        journal.append(json!({"n": 7})).unwrap();
        drop(journal);
        assert_eq!(names(&Journal::open(&out, false).unwrap()), [0, 1, 7]);
    }

    #[test]
    fn another_run_is_refused_and_says_what_differs() {
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("out");
        three_steps(&out);
        let mut journal = Journal::open(&out, false).unwrap();
        journal.begin(&json!({"bits": 3, "method": {"name": "gptq"}})).unwrap();
        let error = journal.begin(&json!({"bits": 4, "method": {"name": "gptq", "seed": 1}})).unwrap_err().to_string();
        assert!(error.contains("bits was 3 and is 4, method.seed was null and is 1") && error.contains("--restart"), "{error}");
        assert!(Journal::open(&out, false).unwrap_err().to_string().contains("another run"));
        drop(journal);
        assert_eq!(names(&Journal::open(&out, true).unwrap()), [0u64; 0]);
    }

    #[test]
    fn numbers_come_back_as_they_were() {
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("out");
        let identity = json!({
            "lr": 0.015f32,
            "thousandths": (0..4000).map(|i| i as f32 / 1000.0).collect::<Vec<_>>(),
            "losses": (1..4000).map(|i| f64::from(i).ln() / 7.0).collect::<Vec<_>>(),
        });
        let mut journal = Journal::open(&out, false).unwrap();
        journal.begin(&identity).unwrap();
        journal.append(json!({"n": 0})).unwrap();
        drop(journal);
        Journal::open(&out, false).unwrap().begin(&identity).unwrap();
    }

    #[test]
    fn a_folder_without_steps_goes_and_one_with_steps_stays() {
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("out");
        let mut journal = Journal::open(&out, false).unwrap();
        journal.begin(&json!({"bits": 3})).unwrap();
        drop(journal);
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
        let folder = three_steps(&out);
        assert!(folder.exists());
        Journal::open(&out, false).unwrap().finish();
        assert!(!folder.exists());
    }
}
