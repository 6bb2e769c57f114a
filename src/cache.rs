//! Facts about this machine that take time to find out, kept in the user's cache folder: one JSON file each.
//!
//! They only ever make a run faster or an estimate better, so a folder that cannot be written is no error, and a file that cannot be
//! read is as good as none.

use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::Write;
use std::path::PathBuf;

/// Where the files lie instead of the system's cache folder.
pub const VARIABLE: &str = "AESPA_CACHE";

#[derive(Clone, Debug)]
pub struct Cache {
    folder: Option<PathBuf>,
}

impl Cache {
    /// `$AESPA_CACHE`, else a folder of this program in the user's cache folder, as the system has it.
    pub fn user() -> Self {
        let chosen = std::env::var_os(VARIABLE).filter(|folder| !folder.is_empty()).map(PathBuf::from);
        Self { folder: chosen.or_else(|| dirs::cache_dir().map(|folder| folder.join(env!("CARGO_PKG_NAME")))) }
    }

    pub fn at(folder: PathBuf) -> Self {
        Self { folder: Some(folder) }
    }

    /// The file of a fact about `subject`, such as an adapter and its driver; what another version of this program found is not asked for.
    fn path(&self, fact: &str, subject: &str) -> Option<PathBuf> {
        let plain = |text: &str| text.chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' }).collect::<String>();
        let name = format!("{}-{}-{}.json", plain(fact), plain(subject), env!("CARGO_PKG_VERSION"));
        self.folder.as_ref().map(|folder| folder.join(name))
    }

    pub fn get<T: DeserializeOwned>(&self, fact: &str, subject: &str) -> Option<T> {
        serde_json::from_slice(&std::fs::read(self.path(fact, subject)?).ok()?).ok()
    }

    /// Keeps `value`, whole or not at all.
    pub fn put<T: Serialize>(&self, fact: &str, subject: &str, value: &T) {
        if let Err(error) = self.try_put(fact, subject, value) {
            tracing::debug!("{fact} of {subject} is not kept: {error}");
        }
    }

    fn try_put<T: Serialize>(&self, fact: &str, subject: &str, value: &T) -> std::io::Result<()> {
        let (Some(path), Some(folder)) = (self.path(fact, subject), &self.folder) else { return Ok(()) };
        std::fs::create_dir_all(folder)?;
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(&serde_json::to_vec_pretty(value)?)?;
        file.persist(path)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_comes_back_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path().join("new"));
        assert_eq!(cache.get::<Vec<u32>>("rates", "a GPU (Vulkan, 1.2)"), None);
        cache.put("rates", "a GPU (Vulkan, 1.2)", &vec![1, 2]);
        assert_eq!(cache.get::<Vec<u32>>("rates", "a GPU (Vulkan, 1.2)"), Some(vec![1, 2]));
        assert_eq!(cache.get::<Vec<u32>>("tiles", "a GPU (Vulkan, 1.2)"), None);
        assert_eq!(cache.get::<String>("rates", "a GPU (Vulkan, 1.2)"), None, "another type is as good as nothing");
        let path = cache.path("rates", "a GPU (Vulkan, 1.2)").unwrap();
        std::fs::write(path, "[1, ").unwrap();
        assert_eq!(cache.get::<Vec<u32>>("rates", "a GPU (Vulkan, 1.2)"), None);
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_no_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let cache = Cache::at(file.path().join("below a file"));
        cache.put("rates", "cpu", &1);
        assert_eq!(cache.get::<u32>("rates", "cpu"), None);
    }
}
