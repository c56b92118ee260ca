//! Passphrases and S3 keys: from files, the environment or the prompt; never from arguments or URLs,
//! never into messages.

use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use tidemark_dedup::{Passphrase, StoreCredentials};
use zeroize::Zeroizing;

use crate::error::{ExportError, Result};
use crate::target::Target;

/// Longest secret file; a passphrase or a pair of keys is far shorter.
const MAX_SECRET_FILE: u64 = 16 * 1024;

/// Asks for a secret that no file and no environment variable gave; `None`: no terminal.
pub type SecretPrompt<'a> = &'a (dyn Fn(&str) -> Option<String> + Sync);

/// Secrets of a target, from its files, the environment or the prompt. Not `Debug`: they are never
/// printed.
pub struct TargetSecrets {
    /// Repository passphrase.
    pub passphrase: Passphrase,
    /// Store credentials.
    pub credentials: StoreCredentials,
}

/// Where secrets are looked up.
pub(crate) struct SecretSources<'a> {
    pub(crate) env: &'a dyn Fn(&str) -> Option<String>,
    pub(crate) prompt: SecretPrompt<'a>,
}

/// Secrets, and what the user should know of them.
pub(crate) struct LoadedSecrets {
    pub(crate) secrets: TargetSecrets,
    pub(crate) notes: Vec<String>,
    /// The passphrase as typed, if it was.
    typed: Option<Zeroizing<String>>,
}

/// The process environment; an empty variable counts as unset.
pub(crate) fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// The environment variable of one target's passphrase: upper case, other than letters and digits
/// become `_`.
pub(crate) fn passphrase_variable(target: &str) -> String {
    let name = target.chars().map(|c| match c.to_ascii_uppercase() {
        c if c.is_ascii_alphanumeric() => c,
        _ => '_',
    });
    format!("TIDEMARK_PASSPHRASE_{}", name.collect::<String>())
}

impl SecretSources<'_> {
    /// All secrets of a target.
    pub(crate) fn load(&self, target: &Target) -> Result<LoadedSecrets> {
        let mut notes = Vec::new();
        let credentials = self.credentials(target, &mut notes)?;
        let (passphrase, typed) = self.passphrase(target, &mut notes)?;
        Ok(LoadedSecrets { secrets: TargetSecrets { passphrase, credentials }, notes, typed })
    }

    /// Before a repository is made: a typing error in its first passphrase would lock everybody out,
    /// so what was typed is asked for again.
    pub(crate) fn confirm(&self, target: &Target, loaded: &LoadedSecrets) -> Result<()> {
        let Some(typed) = &loaded.typed else { return Ok(()) };
        let ask = format!("Passphrase of target {} (again)", target.name);
        let again = Zeroizing::new((self.prompt)(&ask).unwrap_or_default());
        if again != *typed {
            return Err(ExportError::Secret {
                target: target.name.clone(),
                what: "the two passphrases differ; nothing was made".to_owned(),
            });
        }
        Ok(())
    }

    /// The store's credentials alone.
    fn credentials(&self, target: &Target, notes: &mut Vec<String>) -> Result<StoreCredentials> {
        if target.is_local() {
            return Ok(StoreCredentials::default());
        }
        let missing = |what: String| ExportError::Secret { target: target.name.clone(), what };
        if let Some(path) = &target.credentials_file {
            let text = read_secret_file(target, path, notes)?;
            return parse_credentials(&text).ok_or_else(|| {
                missing(format!(
                    "the credentials file {} has no access_key_id and secret_access_key lines",
                    path.display()
                ))
            });
        }
        let mut credentials = StoreCredentials::default();
        let name = &target.name;
        credentials.access_key_id = (self.env)("AWS_ACCESS_KEY_ID")
            .or_else(|| (self.prompt)(&format!("S3 access key id of target {name}")));
        if credentials.access_key_id.is_some() {
            credentials.secret_access_key = (self.env)("AWS_SECRET_ACCESS_KEY")
                .or_else(|| (self.prompt)(&format!("S3 secret access key of target {name}")));
        }
        credentials.session_token = (self.env)("AWS_SESSION_TOKEN");
        if credentials.access_key_id.is_none() || credentials.secret_access_key.is_none() {
            return Err(missing(
                "no S3 keys: name a credentials file when adding the target, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                    .to_owned(),
            ));
        }
        Ok(credentials)
    }

    fn passphrase(
        &self,
        target: &Target,
        notes: &mut Vec<String>,
    ) -> Result<(Passphrase, Option<Zeroizing<String>>)> {
        let error = |what: String| ExportError::Secret { target: target.name.clone(), what };
        let own = passphrase_variable(&target.name);
        let mut typed = false;
        let (secret, place) = if let Some(path) = &target.passphrase_file {
            (read_secret_file(target, path, notes)?, format!("the file {}", path.display()))
        } else if let Some(secret) = (self.env)(&own) {
            (Zeroizing::new(secret), own)
        } else if let Some(secret) = (self.env)("TIDEMARK_PASSPHRASE") {
            (Zeroizing::new(secret), "TIDEMARK_PASSPHRASE".to_owned())
        } else if let Some(secret) = (self.prompt)(&format!("Passphrase of target {}", target.name))
        {
            typed = true;
            (Zeroizing::new(secret), "the prompt".to_owned())
        } else {
            return Err(error(format!(
                "no passphrase: name a passphrase file when adding the target, or set {own} or TIDEMARK_PASSPHRASE"
            )));
        };
        if secret.trim_end_matches(['\r', '\n']).is_empty() {
            return Err(error(format!("the passphrase from {place} is empty")));
        }
        Ok((Passphrase::new(&secret), typed.then_some(secret)))
    }
}

/// Reads a small secret file; notes when others may read it too.
fn read_secret_file(
    target: &Target,
    path: &Path,
    notes: &mut Vec<String>,
) -> Result<Zeroizing<String>> {
    let error = |what: String| ExportError::Secret {
        target: target.name.clone(),
        what: format!("secret file {}: {what}", path.display()),
    };
    let file = std::fs::File::open(path).map_err(|e| error(e.to_string()))?;
    let meta = file.metadata().map_err(|e| error(e.to_string()))?;
    if meta.is_dir() {
        return Err(error("it is a folder".to_owned()));
    }
    if meta.is_file() && meta.mode() & 0o077 != 0 {
        notes.push(format!(
            "secret file {} can be read by others (mode {:03o}); `chmod 600` it",
            path.display(),
            meta.mode() & 0o777
        ));
    }
    let mut bytes = Zeroizing::new(Vec::with_capacity(1024));
    file.take(MAX_SECRET_FILE + 1).read_to_end(&mut bytes).map_err(|e| error(e.to_string()))?;
    if bytes.len() as u64 > MAX_SECRET_FILE {
        return Err(error(format!("it is longer than {MAX_SECRET_FILE} bytes")));
    }
    let text = std::str::from_utf8(&bytes).map_err(|_| error("it is not UTF-8".to_owned()))?;
    Ok(Zeroizing::new(text.to_owned()))
}

/// `key = value` lines; of an INI file the section `default`, else the first one.
fn parse_credentials(text: &str) -> Option<StoreCredentials> {
    let mut sections: Vec<(String, StoreCredentials)> =
        vec![(String::new(), StoreCredentials::default())];
    for line in text.lines().map(str::trim) {
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            sections.push((name.trim().to_owned(), StoreCredentials::default()));
            continue;
        }
        let Some((key, value)) = line.split_once('=') else { continue };
        let value = Some(value.trim().trim_matches('"').to_owned()).filter(|v| !v.is_empty());
        let key = key.trim().to_ascii_lowercase();
        let Some((_, section)) = sections.last_mut() else { continue };
        match key.strip_prefix("aws_").unwrap_or(&key) {
            "access_key_id" => section.access_key_id = value,
            "secret_access_key" => section.secret_access_key = value,
            "session_token" => section.session_token = value,
            _ => {}
        }
    }
    let complete =
        |c: &StoreCredentials| c.access_key_id.is_some() && c.secret_access_key.is_some();
    sections.sort_by_key(|(name, _)| name != "default");
    sections.into_iter().map(|(_, c)| c).find(complete)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::Media;
    use std::os::unix::fs::PermissionsExt as _;

    fn target(url: &str) -> Target {
        Target {
            name: "off-site.1".to_owned(),
            url: url.to_owned(),
            media: Media::Object,
            site: None,
            offsite: true,
            passphrase_file: None,
            credentials_file: None,
        }
    }

    fn failure(sources: &SecretSources<'_>, target: &Target) -> String {
        match sources.load(target) {
            Ok(_) => panic!("loaded"),
            Err(e) => e.to_string(),
        }
    }

    #[test]
    fn the_variable_of_a_target_is_upper_case_with_underscores() {
        assert_eq!(passphrase_variable("off-site.1"), "TIDEMARK_PASSPHRASE_OFF_SITE_1");
    }

    #[test]
    fn missing_secrets_say_what_to_set() {
        let none = SecretSources { env: &|_| None, prompt: &|_| None };
        let error = failure(&none, &target("/backups"));
        assert!(error.contains("TIDEMARK_PASSPHRASE_OFF_SITE_1"), "{error}");
        let error = failure(&none, &target("s3://b"));
        assert!(error.contains("AWS_ACCESS_KEY_ID") && error.contains("off-site.1"), "{error}");
    }

    #[test]
    fn files_come_before_the_environment_and_that_before_the_prompt() {
        let dir = tempfile::tempdir().unwrap();
        let asked = std::sync::atomic::AtomicU32::new(0);
        let prompt = |_: &str| {
            asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            Some("prompted".to_owned())
        };
        let env = |name: &str| (name == "TIDEMARK_PASSPHRASE").then(|| "general".to_owned());
        let sources = SecretSources { env: &env, prompt: &prompt };
        sources.load(&target("/b")).ok().unwrap();
        assert_eq!(asked.load(std::sync::atomic::Ordering::Relaxed), 0);

        let mut with_file = target("/b");
        let path = dir.path().join("empty");
        std::fs::write(&path, "\n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        with_file.passphrase_file = Some(path.clone());
        let error = failure(&sources, &with_file);
        assert!(error.contains("empty"), "the file decides although the variable is set: {error}");

        std::fs::write(&path, "secret\n").unwrap();
        let loaded = sources.load(&with_file).ok().unwrap();
        assert!(loaded.notes[0].contains("mode 640"), "{:?}", loaded.notes);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert!(sources.load(&with_file).ok().unwrap().notes.is_empty());

        std::fs::remove_file(&path).unwrap();
        assert!(failure(&sources, &with_file).contains("secret file"));
    }

    #[test]
    fn a_new_repository_asks_twice() {
        let answers = parking_lot::Mutex::new(vec!["a", "b", "a"]);
        let prompt = |_: &str| answers.lock().pop().map(str::to_owned);
        let sources = SecretSources { env: &|_| None, prompt: &prompt };
        let loaded = sources.load(&target("/b")).ok().unwrap();
        let error = sources.confirm(&target("/b"), &loaded).unwrap_err().to_string();
        assert!(error.contains("differ"), "{error}");
        sources.confirm(&target("/b"), &loaded).unwrap();
    }

    #[test]
    fn credentials_are_read_from_lines_and_from_ini() {
        let plain = parse_credentials("access_key_id=A\n# c\nsecret_access_key = S=x\n").unwrap();
        assert_eq!(plain.access_key_id.as_deref(), Some("A"));
        assert_eq!(plain.secret_access_key.as_deref(), Some("S=x"));
        let ini = "[other]\naws_access_key_id=X\naws_secret_access_key=Y\n[default]\naws_access_key_id = A\naws_secret_access_key = S\naws_session_token = T\n";
        let ini = parse_credentials(ini).unwrap();
        assert_eq!(ini.access_key_id.as_deref(), Some("A"));
        assert_eq!(ini.session_token.as_deref(), Some("T"));
        assert!(parse_credentials("access_key_id=A\n").is_none());
        assert!(parse_credentials("\u{0}garbage").is_none());
    }
}
