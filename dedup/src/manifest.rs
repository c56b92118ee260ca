//! Manifests: one object per restore point, named so that a listing sorts a group's points by age.

use uuid::Uuid;

use crate::error::{RepoError, Result};
use crate::key::Keys;
use crate::map::Root;
use crate::object::{Header, Kind, damaged, open_body, seal_body};
use crate::{DiskRoot, Manifest, WriteStats};

/// Readers refuse larger manifests.
const MAX_LEN: usize = 64 << 20;
const ZSTD_LEVEL: i32 = 3;

/// Prefix of a group's points, or of all.
pub(crate) fn prefix(group: Option<Uuid>) -> String {
    group.map_or("points/".into(), |group| format!("points/{}/", group.simple()))
}

/// Group and point that a key names.
pub(crate) fn parse_key(key: &str) -> Option<(Uuid, Uuid)> {
    let (group, name) = key.strip_prefix("points/")?.split_once('/')?;
    let (_created, point) = name.split_once('-')?;
    Some((Uuid::try_parse(group).ok()?, Uuid::try_parse(point).ok()?))
}

/// Key of a manifest; fails when `created` is not a moment of the years 1970 to 9999.
pub(crate) fn key(manifest: &Manifest) -> Result<String> {
    let bad = || RepoError::Invalid(format!("{:?} is not an RFC 3339 moment", manifest.created));
    let at: jiff::Timestamp = manifest.created.parse().map_err(|_| bad())?;
    if at < jiff::Timestamp::UNIX_EPOCH {
        return Err(bad());
    }
    let created = at.strftime("%Y%m%dT%H%M%S%9fZ");
    Ok(format!("{}{created}-{}", prefix(Some(manifest.group)), manifest.point.simple()))
}

/// Checks what a reader will rely on.
pub(crate) fn check(manifest: &Manifest) -> Result<()> {
    let mut roots = roots(manifest);
    roots.try_for_each(|root| Root::parse(root).map(drop))
}

/// Every map of a restore point.
pub(crate) fn roots(manifest: &Manifest) -> impl Iterator<Item = &DiskRoot> {
    let disks = manifest.disks.iter().map(|disk| &disk.root);
    disks.chain(manifest.files.iter().map(|file| &file.root))
}

/// The object of a manifest.
pub(crate) fn seal(keys: &Keys, repository: [u8; 16], manifest: &Manifest) -> Result<Vec<u8>> {
    seal_padded(keys, repository, manifest, 0)
}

fn seal_padded(
    keys: &Keys,
    repository: [u8; 16],
    manifest: &Manifest,
    blanks: usize,
) -> Result<Vec<u8>> {
    let mut json = serde_json::to_vec(manifest)
        .map_err(|e| RepoError::Invalid(format!("the manifest cannot be written as JSON: {e}")))?;
    json.resize(json.len() + blanks, b' ');
    if json.len() > MAX_LEN {
        return Err(RepoError::Invalid("the manifest is larger than the format allows".into()));
    }
    let header = Header::new(Kind::Manifest, repository, *manifest.point.as_bytes())?;
    seal_body(keys, &header, &json, ZSTD_LEVEL)
}

/// The object of a manifest whose statistics count the object itself: `before` is what the run has
/// taken without it.
pub(crate) fn seal_counted(
    keys: &Keys,
    repository: [u8; 16],
    manifest: &mut Manifest,
    before: WriteStats,
) -> Result<Vec<u8>> {
    let mut len = 0;
    let mut object = Vec::new();
    // The digits of the length are part of the object, which is compressed: with other digits it may be
    // a byte shorter or longer, for ever in turn. Then a few blanks after the JSON break the tie.
    for attempt in 0..64 {
        manifest.stats = WriteStats {
            stored_bytes: before.stored_bytes + len,
            objects: before.objects + 1,
            ..before
        };
        object = seal_padded(keys, repository, manifest, attempt / 4)?;
        if object.len() as u64 == len {
            break;
        }
        len = object.len() as u64;
    }
    Ok(object)
}

/// Reads a manifest, which must be the one that its key promises: an old one put in a newer one's
/// place, or into another group, is found out.
pub(crate) fn open(
    keys: &Keys,
    store: &str,
    name: &str,
    repository: &[u8; 16],
    object: &[u8],
) -> Result<Manifest> {
    let (header, json) = open_body(keys, store, name, Kind::Manifest, repository, object, MAX_LEN)?;
    let manifest: Manifest = serde_json::from_slice(&json)
        .map_err(|e| damaged(name, format!("the manifest does not parse: {e}")))?;
    check(&manifest).map_err(|e| damaged(name, e.to_string()))?;
    if header.object != *manifest.point.as_bytes() || key(&manifest)? != name {
        return Err(damaged(name, "the manifest is of another restore point than its name says"));
    }
    Ok(manifest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(created: &str) -> Manifest {
        Manifest {
            point: Uuid::from_u128(1),
            group: Uuid::from_u128(2),
            created: created.into(),
            disks: Vec::new(),
            files: Vec::new(),
            stats: Default::default(),
            facts: serde_json::Value::Null,
        }
    }

    #[test]
    fn i9_a_manifest_counts_itself_whatever_the_run_took() {
        let keys = Keys::generate().unwrap();
        for n in 0..300 {
            let mut manifest = manifest("2026-08-01T09:00:00Z");
            manifest.facts = serde_json::json!({ "n": n * 7919, "text": "x".repeat(n) });
            let before =
                WriteStats { stored_bytes: n as u64 * 104_729, objects: 2, ..Default::default() };
            let object = seal_counted(&keys, [7; 16], &mut manifest, before).unwrap();
            assert_eq!(
                manifest.stats.stored_bytes - before.stored_bytes,
                object.len() as u64,
                "{n}"
            );
            let name = key(&manifest).unwrap();
            assert_eq!(open(&keys, "s", &name, &[7; 16], &object).unwrap(), manifest);
        }
    }

    #[test]
    fn keys_sort_by_age_and_name_group_and_point() {
        let times = [
            "2026-08-01T09:00:00Z",
            "2026-08-01T09:00:00.000000001Z",
            "2026-08-01T09:00:00.5Z",
            "2026-08-01T13:00:00+02:00",
            "2026-12-01T00:00:00Z",
        ];
        let keys: Vec<String> = times.iter().map(|t| key(&manifest(t)).unwrap()).collect();
        assert!(keys.is_sorted(), "{keys:?}");
        assert_eq!(
            keys[3],
            "points/00000000000000000000000000000002/\
             20260801T110000000000000Z-00000000000000000000000000000001"
        );
        assert_eq!(parse_key(&keys[0]), Some((Uuid::from_u128(2), Uuid::from_u128(1))));
        assert!(key(&manifest("yesterday")).is_err());
        assert!(key(&manifest("1969-01-01T00:00:00Z")).is_err());
    }
}
