//! Passphrases, and what those without one can learn.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use tidemark_dedup::testing::MemoryStore;
use tidemark_dedup::{Compression, OpenOptions, Passphrase, RepoError, Repository};

use crate::support::*;

fn open_with(store: &Arc<MemoryStore>, secret: &str) -> tidemark_dedup::Result<Repository> {
    Repository::open(store.clone(), &Passphrase::new(secret), &OpenOptions::default())
}

#[test]
fn a_wrong_passphrase_damage_and_absence_are_told_apart() {
    let store = Arc::new(MemoryStore::new());
    assert!(matches!(open_with(&store, "x"), Err(RepoError::NoRepository(_))));
    create(store.clone());
    assert!(open_with(&store, "correct horse").is_ok());
    assert!(matches!(open_with(&store, "wrong"), Err(RepoError::WrongPassphrase(_))));
    assert!(matches!(open_with(&store, ""), Err(RepoError::WrongPassphrase(_))));
    let key = store.objects().into_keys().find(|key| key.starts_with("keys/")).unwrap();
    let intact = store.objects();
    let mut bytes = intact[&key].to_vec();
    bytes[110] ^= 1;
    store.replace(&key, bytes);
    let damaged = open_with(&store, "correct horse");
    assert!(matches!(&damaged, Err(RepoError::Damaged { key: k, .. }) if *k == key), "{damaged:?}");
    store.restore(intact);
    let again =
        Repository::create(store.clone(), &Passphrase::new("other"), &OpenOptions::default());
    assert!(matches!(again, Err(RepoError::AlreadyExists { .. })));
}

#[test]
fn a_lost_configuration_is_damage_and_not_an_empty_store() {
    let (store, repository) = memory();
    put_point(&repository, 1, &noise(1, C)).unwrap();
    store.remove("config");
    assert!(matches!(open(store.clone()), Err(RepoError::Damaged { .. })));
    let again = Repository::create(store, &passphrase(), &OpenOptions::default());
    assert!(matches!(again, Err(RepoError::Damaged { .. })));
}

#[test]
fn a_key_object_cannot_make_us_allocate_gigabytes_or_compute_for_hours() {
    let store = Arc::new(MemoryStore::new());
    create(store.clone());
    let key = store.objects().into_keys().find(|key| key.starts_with("keys/")).unwrap();
    let intact = store.objects()[&key].to_vec();
    for (at, value) in [(52, u32::MAX), (52, 1 << 22), (56, u32::MAX), (60, 1 << 20), (48, 9)] {
        let mut bytes = intact[..144].to_vec();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let hash = blake3::hash(&bytes);
        bytes.extend_from_slice(hash.as_bytes());
        store.replace(&key, bytes);
        let begun = Instant::now();
        let refused = open(store.clone());
        assert!(matches!(refused, Err(RepoError::Damaged { .. })), "{refused:?}");
        assert!(begun.elapsed().as_secs() < 5);
    }
}

#[test]
fn newer_versions_and_unknown_features_are_named() {
    let store = Arc::new(MemoryStore::new());
    create(store.clone());
    let intact = store.objects()["config"].to_vec();
    let mut newer = intact[..intact.len() - 32].to_vec();
    newer[8] = 2;
    let hash = blake3::hash(&newer);
    newer.extend_from_slice(hash.as_bytes());
    store.replace("config", newer);
    assert!(matches!(open(store.clone()), Err(RepoError::TooNew { version: 2, .. })));
    let json = String::from_utf8_lossy(&intact[16..intact.len() - 64])
        .replace(r#""required_features":[]"#, r#""required_features":["parity"]"#);
    let mut featured = intact[..12].to_vec();
    featured.extend_from_slice(&(json.len() as u32).to_le_bytes());
    featured.extend_from_slice(json.as_bytes());
    featured.extend_from_slice(&[0; 32]);
    let hash = blake3::hash(&featured);
    featured.extend_from_slice(hash.as_bytes());
    store.replace("config", featured);
    let refused = open(store);
    assert!(
        matches!(&refused, Err(RepoError::UnknownFeature { feature, .. }) if feature == "parity"),
        "{refused:?}"
    );
}

#[test]
fn i8_an_observer_cannot_tell_whether_two_repositories_hold_the_same_data() {
    let data = noise(5, 30 * C);
    let mut seen: HashSet<Vec<u8>> = HashSet::new();
    let mut roots = HashSet::new();
    for _ in 0..2 {
        let (store, repository) = memory();
        let mut writer = repository.begin(Compression::Default).unwrap();
        let root = put_disk(&mut writer, &data).unwrap();
        let mut manifest = manifest(1, vec![("system-disk", root.clone())]);
        manifest.point = uuid::Uuid::new_v4();
        manifest.facts = serde_json::json!({ "vm": "payroll-server" });
        writer.commit(manifest).unwrap();
        assert!(roots.insert(root.page.clone()), "the same root under two keys");
        let page = (0..16).map(|n| u8::from_str_radix(&root.page[2 * n..2 * n + 2], 16).unwrap());
        let page: Vec<u8> = page.collect();
        for (key, object) in store.objects() {
            for secret in ["payroll-server", "system-disk", root.page.as_str()] {
                assert!(!contains(&object, secret.as_bytes()), "{key} shows {secret}");
                assert!(!key.contains(secret));
            }
            assert!(!contains(&object, &page), "{key} shows an id");
            assert!(!contains(&object, &data[..32]), "{key} shows content");
            // The configuration is public, and so are the costs of the key derivation.
            if key != "config" && !key.starts_with("keys/") {
                // Past the magic, version and flags nothing is ever the same.
                for window in object[16..].chunks_exact(16).filter(|w| w.iter().any(|b| *b != 0)) {
                    let own = window == &object[16..32];
                    assert!(own || seen.insert(window.to_vec()), "{key}: repeats");
                }
            }
        }
    }
}

fn contains(object: &[u8], what: &[u8]) -> bool {
    object.windows(what.len()).any(|window| window == what)
}
