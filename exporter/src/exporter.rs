//! The targets of a data directory: adding, testing and opening them.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tidemark_dedup::{OpenOptions, RepoError, Repository, Store, open_store};
use tidemark_engine::Engine;

use crate::error::{ExportError, Result};
use crate::probe::probe;
use crate::secrets::{LoadedSecrets, SecretPrompt, SecretSources, environment};
use crate::target::{KnownTarget, Target, TargetFiles};

/// The targets of a data directory and what can be done with them.
pub struct Exporter<'a> {
    pub(crate) engine: &'a Engine,
    prompt: SecretPrompt<'a>,
    pub(crate) files: TargetFiles,
    /// Opened repositories: deriving a key from a passphrase takes about a second, and a prompt
    /// should come once.
    open: Mutex<HashMap<String, Repository>>,
    notes: Mutex<Vec<String>>,
}

impl<'a> Exporter<'a> {
    /// Over the targets of the engine's data directory.
    pub fn new(engine: &'a Engine, prompt: SecretPrompt<'a>) -> Self {
        Self {
            engine,
            prompt,
            files: TargetFiles::new(engine.data_dir()),
            open: Mutex::default(),
            notes: Mutex::default(),
        }
    }

    /// Adds a target: probes the store, opens its repository or makes one. Gives whether it was made
    /// and how many restore points were found.
    pub fn add_target(&self, target: &Target) -> Result<(bool, usize)> {
        let target = target.normalised()?;
        if self.files.exists(&target.name) {
            return Err(ExportError::TargetExists(target.name));
        }
        let loaded = self.load_secrets(&target)?;
        let store = self.open_store(&target, &loaded)?;
        probe(&target.name, &store)?;
        // A kill from here on may leave a repository without a target file: the next `add` finds it
        // and takes it as it is.
        let (made, repository) = self.open_or_create(&target, store, &loaded)?;
        if let Some(other) =
            self.files.list()?.into_iter().find(|known| known.repository == repository.id())
        {
            return Err(ExportError::Invalid(format!(
                "target {} has the same repository already; a second name for it would count as a second copy that does not exist",
                other.target.name
            )));
        }
        let found = if made { 0 } else { count_points(&target.name, &repository)? };
        self.files.add(&target, repository.id())?;
        self.open.lock().insert(target.name.clone(), repository);
        Ok((made, found))
    }

    fn open_or_create(
        &self,
        target: &Target,
        store: Arc<dyn Store>,
        loaded: &LoadedSecrets,
    ) -> Result<(bool, Repository)> {
        let options = self.open_options(&target.name);
        let passphrase = &loaded.secrets.passphrase;
        match Repository::open(store.clone(), passphrase, &options) {
            Ok(repository) => return Ok((false, repository)),
            Err(RepoError::NoRepository(_)) => {}
            Err(e) => return Err(ExportError::on(&target.name)(e)),
        }
        self.sources().confirm(target, loaded)?;
        match Repository::create(store.clone(), passphrase, &options) {
            Ok(repository) => Ok((true, repository)),
            // Somebody else was quicker: theirs it is, if the passphrase fits.
            Err(RepoError::AlreadyExists { .. }) => {
                let repository = Repository::open(store, passphrase, &options);
                Ok((false, repository.map_err(ExportError::on(&target.name))?))
            }
            Err(e) => Err(ExportError::on(&target.name)(e)),
        }
    }

    /// Configured targets, by name.
    pub fn targets(&self) -> Result<Vec<Target>> {
        Ok(self.files.list()?.into_iter().map(|known| known.target).collect())
    }

    /// Writes, reads, lists and deletes a probe object, checks conditional create and the key.
    pub fn test_target(&self, name: &str) -> Result<Vec<String>> {
        let known = self.files.get(name)?;
        let loaded = self.load_secrets(&known.target)?;
        let store = self.open_store(&known.target, &loaded)?;
        let mut checked = probe(name, &store)?;
        let repository = self.open_known(&known, store, &loaded)?;
        checked.push(format!("passphrase opens repository {}", repository.id()));
        let points = count_points(name, &repository)?;
        checked.push(format!("{points} restore points can be listed"));
        self.open.lock().insert(name.to_owned(), repository);
        Ok(checked)
    }

    /// Forgets a target; the repository stays as it is.
    pub fn remove_target(&self, name: &str) -> Result<()> {
        self.files.remove(name)?;
        self.open.lock().remove(name);
        // The cache is only a copy; what cannot be removed now is never read again.
        if let Some(cache) = self.open_options(name).cache_dir
            && let Err(e) = std::fs::remove_dir_all(&cache)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!("remove cache {}: {e}", cache.display());
        }
        Ok(())
    }

    /// Opens a target's repository.
    pub fn repository(&self, name: &str) -> Result<Repository> {
        let known = self.files.get(name)?;
        // Not held while opening: that may take long or ask at a prompt.
        if let Some(repository) = self.open.lock().get(name)
            && repository.id() == known.repository
        {
            return Ok(repository.clone());
        }
        let loaded = self.load_secrets(&known.target)?;
        let store = self.open_store(&known.target, &loaded)?;
        let repository = self.open_known(&known, store, &loaded)?;
        self.open.lock().insert(name.to_owned(), repository.clone());
        Ok(repository)
    }

    /// Opens the repository that a target is known to have, and no other in its place.
    fn open_known(
        &self,
        known: &KnownTarget,
        store: Arc<dyn Store>,
        loaded: &LoadedSecrets,
    ) -> Result<Repository> {
        let name = &known.target.name;
        let options = self.open_options(name);
        let repository = Repository::open(store, &loaded.secrets.passphrase, &options)
            .map_err(ExportError::on(name))?;
        if repository.id() != known.repository {
            return Err(ExportError::Unfit {
                target: name.clone(),
                what: format!(
                    "the repository there is {}, but {} was added; is the right store mounted? If it was replaced on purpose, remove the target and add it again",
                    repository.id(),
                    known.repository
                ),
            });
        }
        Ok(repository)
    }

    /// What the user should know of secret files, once.
    pub fn take_notes(&self) -> Vec<String> {
        std::mem::take(&mut *self.notes.lock())
    }

    fn sources(&self) -> SecretSources<'_> {
        SecretSources { env: &environment, prompt: self.prompt }
    }

    fn load_secrets(&self, target: &Target) -> Result<LoadedSecrets> {
        let mut loaded = self.sources().load(target)?;
        self.notes.lock().append(&mut loaded.notes);
        Ok(loaded)
    }

    fn open_store(&self, target: &Target, loaded: &LoadedSecrets) -> Result<Arc<dyn Store>> {
        open_store(&target.url, &loaded.secrets.credentials).map_err(ExportError::on(&target.name))
    }

    fn open_options(&self, name: &str) -> OpenOptions {
        OpenOptions { cache_dir: Some(self.engine.data_dir().join("cache").join(name)) }
    }
}

/// Damaged manifests count too: they are there.
fn count_points(target: &str, repository: &Repository) -> Result<usize> {
    Ok(repository.points(None).map_err(ExportError::on(target))?.len())
}
