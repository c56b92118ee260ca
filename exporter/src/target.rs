//! Target files: `<data-dir>/targets/<name>.json`, one each, mode 0600, without secrets.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::{ExportError, Result};

/// Version of the target files.
const VERSION: u32 = 1;
/// A target file has a few hundred bytes; anything longer is not one.
const MAX_FILE: u64 = 64 * 1024;

/// Media class of a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Media {
    /// Local or network disk.
    Disk,
    /// Object store.
    Object,
    /// Tape.
    Tape,
}

/// A configured target; stored in `<data-dir>/targets/<name>.json`, without secrets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// Name.
    pub name: String,
    /// Store URL.
    pub url: String,
    /// Media class.
    pub media: Media,
    /// Site, for 3-2-1.
    pub site: Option<String>,
    /// Away from the host's site.
    pub offsite: bool,
    /// File that holds the repository's passphrase.
    pub passphrase_file: Option<PathBuf>,
    /// File that holds the S3 keys (`access_key_id=…`, `secret_access_key=…` lines, or AWS's INI form).
    pub credentials_file: Option<PathBuf>,
}

impl Target {
    /// Whether it is a folder of this host (or mounted on it), not an object store.
    pub fn is_local(&self) -> bool {
        !self.url.contains("://") || self.url.starts_with("file://")
    }

    /// The same target with absolute paths, so that it means the same from every working directory;
    /// refuses names and URLs that cannot be kept.
    pub(crate) fn normalised(&self) -> Result<Self> {
        check_name(&self.name)?;
        check_url(&self.url)?;
        let mut target = self.clone();
        if !target.url.contains("://") {
            let path = absolute(Path::new(&target.url))?;
            target.url = path.into_os_string().into_string().map_err(|path| {
                ExportError::Invalid(format!("the path {} is not UTF-8", path.display()))
            })?;
        }
        for path in
            [&mut target.passphrase_file, &mut target.credentials_file].into_iter().flatten()
        {
            *path = absolute(path)?;
        }
        Ok(target)
    }
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(ExportError::io("resolve", path))
}

/// The name becomes a file name and part of an environment variable.
fn check_name(name: &str) -> Result<()> {
    let fits = !name.is_empty()
        && name.len() <= 64
        && !name.starts_with(['.', '-'])
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
    if fits {
        return Ok(());
    }
    Err(ExportError::Invalid(format!(
        "{name:?} cannot be a target's name: use 1 to 64 of A-Z a-z 0-9 . _ - and begin with a letter or digit"
    )))
}

/// Query keys that would put a secret where logs and process lists show it.
const SECRET_WORDS: [&str; 6] =
    ["secret", "password", "passphrase", "token", "access_key", "key_id"];

/// Secrets in URLs end up in logs, listings and shell histories: refused without repeating them.
fn check_url(url: &str) -> Result<()> {
    if url.is_empty() || url.len() > 4096 || url.contains(['\n', '\r', '\0']) {
        return Err(ExportError::Invalid("a target needs a URL or a folder".to_owned()));
    }
    let Some((scheme, _)) = url.split_once("://") else {
        return Ok(());
    };
    let parsed = url::Url::parse(url)
        .map_err(|e| ExportError::Invalid(format!("the {scheme} URL cannot be parsed: {e}")))?;
    if !parsed.username().is_empty() || parsed.password().is_some() {
        return Err(no_secrets("a user name or password"));
    }
    for (key, value) in parsed.query_pairs() {
        let key = key.to_ascii_lowercase().replace('-', "_");
        if SECRET_WORDS.iter().any(|word| key.contains(word)) {
            return Err(no_secrets(&format!("the parameter {key}")));
        }
        // An endpoint is a URL of its own.
        if url::Url::parse(&value).is_ok_and(|u| !u.username().is_empty() || u.password().is_some())
        {
            return Err(no_secrets(&format!("a user name or password in {key}")));
        }
    }
    Ok(())
}

fn no_secrets(what: &str) -> ExportError {
    ExportError::Invalid(format!(
        "a target's URL must not hold secrets, but this one has {what}; put S3 keys into a credentials file or into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    ))
}

/// A target with the identity of its repository, so that an exchanged or unmounted store is noticed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KnownTarget {
    version: u32,
    pub(crate) repository: Uuid,
    #[serde(flatten)]
    pub(crate) target: Target,
}

/// The folder of target files.
pub(crate) struct TargetFiles {
    dir: PathBuf,
}

impl TargetFiles {
    pub(crate) fn new(data_dir: &Path) -> Self {
        Self { dir: data_dir.join("targets") }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.json"))
    }

    /// Writes a new target's file. A kill before the rename leaves a temporary file that nobody
    /// reads; after it, the target stands.
    pub(crate) fn add(&self, target: &Target, repository: Uuid) -> Result<()> {
        std::fs::create_dir_all(&self.dir).map_err(ExportError::io("create", &self.dir))?;
        let path = self.path(&target.name);
        let known = KnownTarget { version: VERSION, repository, target: target.clone() };
        let mut text = serde_json::to_vec_pretty(&known)
            .map_err(|e| ExportError::Invalid(format!("target {}: {e}", target.name)))?;
        text.push(b'\n');
        // Created 0600 by the crate.
        let mut file = tempfile::Builder::new()
            .prefix(".target-")
            .tempfile_in(&self.dir)
            .map_err(ExportError::io("create a file in", &self.dir))?;
        file.write_all(&text).map_err(ExportError::io("write", &path))?;
        file.as_file().sync_all().map_err(ExportError::io("sync", &path))?;
        file.persist_noclobber(&path).map_err(|e| match e.error.kind() {
            std::io::ErrorKind::AlreadyExists => ExportError::TargetExists(target.name.clone()),
            _ => ExportError::Io { op: "create", path: path.clone(), source: e.error },
        })?;
        sync_dir(&self.dir)
    }

    pub(crate) fn exists(&self, name: &str) -> bool {
        check_name(name).is_ok() && self.path(name).exists()
    }

    pub(crate) fn get(&self, name: &str) -> Result<KnownTarget> {
        if check_name(name).is_err() {
            return Err(ExportError::NoSuchTarget(name.to_owned()));
        }
        let path = self.path(name);
        let file = match std::fs::File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(ExportError::NoSuchTarget(name.to_owned()));
            }
            Err(source) => return Err(ExportError::Io { op: "open", path, source }),
        };
        let mut text = Vec::new();
        file.take(MAX_FILE + 1).read_to_end(&mut text).map_err(ExportError::io("read", &path))?;
        let damaged = |what: String| ExportError::DamagedFile {
            path: path.clone(),
            what: format!(
                "{what}; remove the target and add it again (its repository is untouched)"
            ),
        };
        if text.len() as u64 > MAX_FILE {
            return Err(damaged("it is too long".to_owned()));
        }
        let known: KnownTarget =
            serde_json::from_slice(&text).map_err(|e| damaged(e.to_string()))?;
        if known.version > VERSION {
            return Err(ExportError::DamagedFile {
                path,
                what: format!("its version {} is newer than this program", known.version),
            });
        }
        if known.target.name != name {
            return Err(damaged(format!("it names the target {:?}", known.target.name)));
        }
        Ok(known)
    }

    /// All targets, by name.
    pub(crate) fn list(&self) -> Result<Vec<KnownTarget>> {
        let entries = match std::fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => {
                return Err(ExportError::Io { op: "list", path: self.dir.clone(), source });
            }
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(ExportError::io("list", &self.dir))?;
            let name = entry.file_name();
            let Some(name) = name.to_str().and_then(|n| n.strip_suffix(".json")) else { continue };
            if check_name(name).is_ok() {
                names.push(name.to_owned());
            }
        }
        names.sort();
        names.iter().map(|name| self.get(name)).collect()
    }

    pub(crate) fn remove(&self, name: &str) -> Result<()> {
        if !self.exists(name) {
            return Err(ExportError::NoSuchTarget(name.to_owned()));
        }
        let path = self.path(name);
        std::fs::remove_file(&path).map_err(ExportError::io("remove", &path))?;
        sync_dir(&self.dir)
    }
}

/// Makes creations, renames and removals in a folder durable.
pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    std::fs::File::open(dir).and_then(|d| d.sync_all()).map_err(ExportError::io("sync", dir))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn target(name: &str, url: &str) -> Target {
        Target {
            name: name.to_owned(),
            url: url.to_owned(),
            media: Media::Disk,
            site: Some("here".to_owned()),
            offsite: false,
            passphrase_file: Some("secret.txt".into()),
            credentials_file: None,
        }
    }

    #[test]
    fn a_target_file_is_private_and_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let files = TargetFiles::new(dir.path());
        let id = Uuid::new_v4();
        let t = target("local", "/backups").normalised().unwrap();
        files.add(&t, id).unwrap();
        let mode = std::fs::metadata(dir.path().join("targets/local.json")).unwrap().permissions();
        assert_eq!(mode.mode() & 0o777, 0o600);
        let known = files.get("local").unwrap();
        assert_eq!((known.repository, known.target), (id, t));
        assert!(files.list().unwrap()[0].target.passphrase_file.as_ref().unwrap().is_absolute());
        assert!(matches!(files.add(&target("local", "/x"), id), Err(ExportError::TargetExists(_))));
        files.remove("local").unwrap();
        assert!(matches!(files.get("local"), Err(ExportError::NoSuchTarget(_))));
        assert!(matches!(files.remove("local"), Err(ExportError::NoSuchTarget(_))));
        assert!(files.list().unwrap().is_empty());
    }

    #[test]
    fn names_that_are_paths_are_refused() {
        for name in ["", "../x", "a/b", ".hidden", "-x", "a b", "ü", &"x".repeat(65)] {
            assert!(target(name, "/b").normalised().is_err(), "{name:?}");
        }
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(
            TargetFiles::new(dir.path()).get("../x"),
            Err(ExportError::NoSuchTarget(_))
        ));
    }

    #[test]
    fn secrets_in_urls_are_refused_and_not_repeated() {
        for url in [
            "s3://AKIAX:hunter2@bucket/p",
            "s3://hunter2@bucket",
            "s3://bucket?secret_access_key=hunter2",
            "s3://bucket?aws-secret-access-key=hunter2",
            "s3://bucket?endpoint=http://u:hunter2@host:1",
            "s3://bucket?session_token=hunter2",
        ] {
            let error = target("t", url).normalised().unwrap_err().to_string();
            assert!(!error.contains("hunter2"), "{error}");
            assert!(error.contains("credentials file"), "{error}");
        }
        target("t", "s3://bucket/p?endpoint=http://127.0.0.1:8333&region=us-east-1")
            .normalised()
            .unwrap();
    }

    #[test]
    fn a_damaged_or_newer_target_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let files = TargetFiles::new(dir.path());
        files.add(&target("a", "/b"), Uuid::new_v4()).unwrap();
        let path = dir.path().join("targets/a.json");
        let good = std::fs::read_to_string(&path).unwrap();
        for (bad, word) in [
            (good.replace("\"version\": 1", "\"version\": 2"), "newer"),
            (good.replace("\"name\": \"a\"", "\"name\": \"b\""), "names the target"),
            ("{".to_owned(), "damaged"),
            ("x".repeat(70_000), "too long"),
        ] {
            std::fs::write(&path, bad).unwrap();
            let error = files.get("a").unwrap_err().to_string();
            assert!(error.contains("a.json") && error.contains(word), "{error}");
        }
    }
}
