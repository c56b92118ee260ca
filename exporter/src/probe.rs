//! Is a store fit for a repository? One small object goes through everything a repository does.

use std::sync::Arc;

use bytes::Bytes;
use tidemark_dedup::{RepoError, Store};
use uuid::Uuid;

use crate::error::{ExportError, Result};

/// Creates, reads, lists, refuses to overwrite and deletes a probe object. Gives what was checked.
pub(crate) fn probe(target: &str, store: &Arc<dyn Store>) -> Result<Vec<String>> {
    // Store futures want tokio's timers and sockets; the probe has no runtime to borrow.
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| {
            ExportError::Invalid(format!("the runtime for store access did not start: {e}"))
        })?;
    let key = format!("probe/{}", Uuid::new_v4());
    runtime.block_on(async {
        let checked = exercise(target, store.as_ref(), &key).await;
        // Also after a failure; a kill leaves an object of a few bytes under probe/.
        let deleted = store.delete(&key).await;
        let mut checked = checked?;
        deleted.map_err(ExportError::on(target))?;
        match store.get(&key).await {
            Err(RepoError::Missing { .. }) => checked.push("delete".to_owned()),
            Err(e) => return Err(ExportError::on(target)(e)),
            Ok(_) => return Err(unfit(target, "a deleted object can still be read")),
        }
        Ok(checked)
    })
}

fn unfit(target: &str, what: &str) -> ExportError {
    ExportError::Unfit {
        target: target.to_owned(),
        what: format!("the store is not fit for a repository: {what}"),
    }
}

async fn exercise(target: &str, store: &dyn Store, key: &str) -> Result<Vec<String>> {
    let content = Bytes::from(format!("tidemark probe {key}"));
    let on = || ExportError::on(target);
    store.create(key, content.clone()).await.map_err(on())?;
    if store.get(key).await.map_err(on())? != content {
        return Err(unfit(target, "it returned other bytes than were written"));
    }
    if store.get_range(key, 9..14).await.map_err(on())? != content.slice(9..14) {
        return Err(unfit(target, "it returned other bytes than a range read asked for"));
    }
    if store.size(key).await.map_err(on())? != content.len() as u64 {
        return Err(unfit(target, "it gave a wrong object size"));
    }
    if !store.list("probe/").await.map_err(on())?.iter().any(|o| o.key == key) {
        return Err(unfit(target, "a listing did not show a new object"));
    }
    // Other content than before: a store that retries may take its own earlier write for a success.
    match store.create(key, Bytes::from_static(b"second writer")).await {
        Err(RepoError::AlreadyExists { .. }) => {}
        Err(e) => return Err(on()(e)),
        Ok(()) => {
            return Err(unfit(
                target,
                "it overwrites objects although asked not to (If-None-Match), so two writers could destroy each other's restore points",
            ));
        }
    }
    let words = ["create", "read", "read a range", "size", "list", "conditional create"];
    Ok(words.map(str::to_owned).to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use async_trait::async_trait;
    use parking_lot::Mutex;
    use std::collections::BTreeMap;
    use std::ops::Range;
    use tidemark_dedup::store::ObjectInfo;

    /// A store in memory with one chosen vice.
    struct Faulty {
        objects: Mutex<BTreeMap<String, Bytes>>,
        vice: &'static str,
    }

    impl Faulty {
        fn missing(key: &str) -> RepoError {
            RepoError::Missing { store: "memory".into(), key: key.into() }
        }
    }

    #[async_trait]
    impl Store for Faulty {
        fn describe(&self) -> String {
            "memory".to_owned()
        }
        async fn create(&self, key: &str, data: Bytes) -> tidemark_dedup::Result<()> {
            let mut objects = self.objects.lock();
            if objects.contains_key(key) && self.vice != "overwrites" {
                return Err(RepoError::AlreadyExists { store: "memory".into(), key: key.into() });
            }
            objects.insert(key.to_owned(), data);
            Ok(())
        }
        async fn get(&self, key: &str) -> tidemark_dedup::Result<Bytes> {
            let data = self.objects.lock().get(key).cloned().ok_or_else(|| Self::missing(key))?;
            Ok(if self.vice == "garbles" { data.slice(1..) } else { data })
        }
        async fn get_range(&self, key: &str, range: Range<u64>) -> tidemark_dedup::Result<Bytes> {
            let data = self.objects.lock().get(key).cloned().ok_or_else(|| Self::missing(key))?;
            let shift = u64::from(self.vice == "shifts");
            Ok(data.slice((range.start + shift) as usize..(range.end + shift) as usize))
        }
        async fn size(&self, key: &str) -> tidemark_dedup::Result<u64> {
            Ok(self.get(key).await?.len() as u64)
        }
        async fn list(&self, prefix: &str) -> tidemark_dedup::Result<Vec<ObjectInfo>> {
            if self.vice == "stale" {
                return Ok(Vec::new());
            }
            let objects = self.objects.lock();
            let found = objects.iter().filter(|(k, _)| k.starts_with(prefix));
            Ok(found.map(|(k, v)| ObjectInfo { key: k.clone(), size: v.len() as u64 }).collect())
        }
        async fn delete(&self, key: &str) -> tidemark_dedup::Result<()> {
            if self.vice != "keeps" {
                self.objects.lock().remove(key);
            }
            Ok(())
        }
    }

    fn run(vice: &'static str) -> (Result<Vec<String>>, usize) {
        let faulty = Arc::new(Faulty { objects: Mutex::default(), vice });
        let result = probe("t", &(faulty.clone() as Arc<dyn Store>));
        let left = faulty.objects.lock().len();
        (result, left)
    }

    #[test]
    fn a_good_store_passes_and_keeps_nothing() {
        let (result, left) = run("");
        assert_eq!(result.unwrap().len(), 7);
        assert_eq!(left, 0);
    }

    #[test]
    fn every_vice_is_found() {
        for (vice, word) in [
            ("overwrites", "If-None-Match"),
            ("garbles", "other bytes"),
            ("shifts", "range"),
            ("stale", "listing"),
            ("keeps", "deleted object"),
        ] {
            let (result, left) = run(vice);
            let error = result.unwrap_err().to_string();
            assert!(error.contains(word) && error.contains("target t"), "{vice}: {error}");
            assert_eq!(left, usize::from(vice == "keeps"), "{vice}");
        }
    }
}
