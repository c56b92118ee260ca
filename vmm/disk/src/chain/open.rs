//! Finding and opening the files of a chain.

use std::collections::HashSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::node::Node;
use super::rules::{Rule, Rules};
use crate::error::{DiskError, Result};
use crate::fs;
use crate::vhdx::{Access, BlockState, Kind, ParentLink, ParentLocator, Properties, Vhdx, create};

/// Files a chain may have: Hyper-V allows 50 checkpoints, and a loop must end somewhere.
pub(super) const MAX_FILES: usize = 64;

/// The folder a disk file lies in.
pub(super) fn folder_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Opens the files from base to leaf. Only the leaf is opened with `access`; parents are shared.
pub(super) fn open_nodes(leaf: &Path, access: Access) -> Result<Vec<Node>> {
    open_nodes_among(leaf, access, &[])
}

/// Like [`open_nodes`]; parents that are not in their child's folder are looked for in `folders`.
pub(super) fn open_nodes_among(
    leaf: &Path,
    access: Access,
    folders: &[PathBuf],
) -> Result<Vec<Node>> {
    let mut nodes = vec![Node::new(Vhdx::open(leaf, access)?, access)];
    let mut seen = HashSet::from([folder_of(leaf).join(leaf.file_name().unwrap_or_default())]);
    while let Some(child) = nodes.last() {
        let properties = child.properties();
        let Some(locator) = locator_of(child.path(), &properties)? else { break };
        if nodes.len() == MAX_FILES {
            let what = format!("its chain has more than {MAX_FILES} files");
            return Err(DiskError::corrupt(leaf, what));
        }
        let mut places = vec![folder_of(child.path())];
        places.extend_from_slice(folders);
        let parent = open_parent(&places, child.path(), &properties, &locator, &mut seen)?;
        nodes.push(if access == Access::ReadWrite { settled(parent)? } else { parent });
    }
    if access == Access::ReadWrite && Rules::of(leaf).obey(Rule::SyncWhatWasFound) {
        sync_found(&nodes)?;
    }
    nodes.reverse();
    Ok(nodes)
}

/// The parent locator of a differencing file, `None` for a base.
fn locator_of(path: &Path, properties: &Properties) -> Result<Option<ParentLocator>> {
    match (properties.kind, &properties.parent) {
        (Kind::Differencing, None) => {
            Err(DiskError::corrupt(path, "a differencing disk that names no parent"))
        }
        (Kind::Differencing, Some(locator)) => Ok(Some(locator.clone())),
        _ => Ok(None),
    }
}

/// The file names a locator gives, in the order the format wants them tried. Only the last part of
/// each path counts: a path from a file is never opened.
pub(super) fn names_of(locator: &ParentLocator) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    let paths = [&locator.relative_path, &locator.volume_path, &locator.absolute_path];
    for path in paths.into_iter().flatten() {
        let name = last_part(path);
        let usable = !matches!(name, "" | "." | "..") && name.len() <= 255 && !name.contains('\0');
        if usable && !names.iter().any(|n| n == name) {
            names.push(name.to_owned());
        }
    }
    names
}

/// Whether a parent with this DataWriteGuid is the one the child means. `linkage2` is what a merge
/// that was cut short was about to set, or had set.
pub(super) fn accepts(locator: &ParentLocator, parent: Uuid) -> bool {
    parent == locator.linkage || locator.linkage2 == Some(parent)
}

/// What a child should say of the parent it was opened with. A merge that was cut short: the one GUID
/// that counts is the parent's present one. Paths that no longer lead to the parent, for it was renamed
/// or moved together with the child, are brought up to date, as the format demands; those that do are
/// left as their writer made them. Written in one log entry: a kill leaves the one or the other, and
/// both name the parent.
pub(super) fn refreshed(found: &ParentLocator, child: &Path, parent: &Node) -> ParentLocator {
    let guid = parent.properties().data_write_guid;
    let mut fresh = found.clone();
    if fresh.linkage2.take().is_some() {
        fresh.linkage = guid;
    }
    let link = ParentLink { path: parent.path().to_owned(), data_write_guid: guid };
    // A folder whose name no locator can hold: what is there was good enough to find it.
    let Ok(now) = create::locator(child, &link) else { return fresh };
    let leads_there = |path: &Option<String>| {
        let last = path.as_deref().map(last_part);
        last.is_some() && last == parent.name().to_str()
    };
    // A name alone means the same as one with `.\` before it.
    let relative = found.relative_path.as_deref().map(|p| p.strip_prefix(".\\").unwrap_or(p));
    if relative != now.relative_path.as_deref().map(|p| p.strip_prefix(".\\").unwrap_or(p)) {
        fresh.relative_path = now.relative_path;
    }
    if !leads_there(&found.absolute_path) {
        fresh.absolute_path = now.absolute_path;
    }
    if !leads_there(&found.volume_path) {
        fresh.volume_path = None;
    }
    fresh
}

/// The file name in a path of a locator.
fn last_part(path: &str) -> &str {
    path.rsplit(['\\', '/']).next().unwrap_or_default()
}

fn open_parent(
    folders: &[PathBuf],
    child: &Path,
    of: &Properties,
    locator: &ParentLocator,
    seen: &mut HashSet<PathBuf>,
) -> Result<Node> {
    let names = names_of(locator);
    let mut refused = None;
    let places = folders.iter().flat_map(|folder| names.iter().map(move |n| (folder, n)));
    for (folder, name) in places {
        let path = folder.join(name);
        // A link could lead out of the folder; `Vhdx::open` refuses what else is not a file.
        match fs::is_file(&path) {
            Ok(true) => {}
            Ok(false) => continue,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            Err(e) => return Err(DiskError::io("examine", &path, e)),
        }
        if !seen.insert(path.clone()) {
            let what = format!("its parents form a loop at {}", name.escape_debug());
            return Err(DiskError::corrupt(child, what));
        }
        let vhdx = Vhdx::open(&path, Access::ReadOnly)?;
        match check_parent(child, of, locator, &path, &vhdx.properties()) {
            Ok(()) => return Ok(Node::new(vhdx, Access::ReadOnly)),
            Err(e) => refused = refused.or(Some(e)),
        }
    }
    Err(refused.unwrap_or_else(|| DiskError::ParentMissing {
        path: child.to_owned(),
        parent: names.first().map_or_else(String::new, |n| n.escape_debug().to_string()),
    }))
}

/// Finishes what the death of a writer left in a file that is a parent now: it had been switched away
/// from and not closed yet. A flush of the leaf promises what was written there too.
///
/// A kill in between leaves the file as it was, or closed clean.
fn settled(parent: Node) -> Result<Node> {
    if !parent.vhdx.has_recovered() {
        return Ok(parent);
    }
    let path = parent.path().to_owned();
    drop(parent);
    let vhdx = Vhdx::open(&path, Access::ReadWrite)?;
    vhdx.freeze()?;
    Ok(Node::new(vhdx, Access::ReadOnly))
}

/// Rule `SyncWhatWasFound`. The leaf, the first of the nodes, is synced when its headers are written.
fn sync_found(nodes: &[Node]) -> Result<()> {
    let Some((leaf, parents)) = nodes.split_first() else { return Ok(()) };
    parents.iter().try_for_each(|parent| parent.vhdx.sync())?;
    fs::sync_folder_of(leaf.path()).map_err(|e| DiskError::io("sync the folder of", leaf.path(), e))
}

/// Whether a file can be a child's parent.
pub(super) fn check_parent(
    child: &Path,
    of: &Properties,
    locator: &ParentLocator,
    path: &Path,
    parent: &Properties,
) -> Result<()> {
    if !accepts(locator, parent.data_write_guid) {
        return Err(DiskError::ParentChanged {
            path: child.to_owned(),
            parent: path.to_owned(),
            expected: locator.linkage.to_string(),
            found: parent.data_write_guid.to_string(),
        });
    }
    let (mine, theirs) = (of.geometry, parent.geometry);
    if mine.logical_sector != theirs.logical_sector {
        let what = format!(
            "its sectors have {} bytes, those of its parent {} {}",
            mine.logical_sector,
            path.display(),
            theirs.logical_sector
        );
        return Err(DiskError::corrupt(child, what));
    }
    if mine.size < theirs.size {
        let what = format!("it is smaller than its parent {}", path.display());
        return Err(DiskError::Unsupported { path: child.to_owned(), what });
    }
    Ok(())
}

/// A file that names another one of the same folder as its parent.
pub(super) struct ChildFile {
    pub(super) path: PathBuf,
    /// What it says of its parent.
    pub(super) locator: ParentLocator,
    /// Whether it holds nothing at all.
    pub(super) empty: bool,
}

/// What a look through a folder found.
#[derive(Default)]
pub(super) struct Children {
    pub(super) files: Vec<ChildFile>,
    /// Disk files that could not be read, and why. Files that another chain writes are left out:
    /// whoever writes a child holds its parent too.
    pub(super) unreadable: Vec<(PathBuf, DiskError)>,
}

/// Looks for the files in `parent`'s folder that name it as their parent, but for those of `except`.
pub(super) fn children_of(parent: &Path, except: &[OsString]) -> Result<Children> {
    let folder = folder_of(parent);
    let mut found = Children::default();
    let Some(name) = parent.file_name() else { return Ok(found) };
    for entry in fs::list(&folder).map_err(|e| DiskError::io("list", &folder, e))? {
        let other = entry.name;
        let candidate =
            is_disk_name(Path::new(&other)) && other != name && !except.contains(&other);
        if !candidate || !entry.regular {
            continue;
        }
        let path = folder.join(&other);
        match Vhdx::open(&path, Access::ReadOnly) {
            Ok(vhdx) => found.files.extend(child_file(&vhdx, name)),
            Err(DiskError::Busy { .. }) => {}
            // Shorter than the headers: cut off in its creation, so nothing was ever in it.
            Err(_) if entry.len.is_some_and(|len| len < 1 << 20) => {}
            Err(DiskError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => found.unreadable.push((path, e)),
        }
    }
    Ok(found)
}

fn is_disk_name(name: &Path) -> bool {
    name.extension()
        .is_some_and(|e| e.eq_ignore_ascii_case("avhdx") || e.eq_ignore_ascii_case("vhdx"))
}

fn child_file(vhdx: &Vhdx, parent: &std::ffi::OsStr) -> Option<ChildFile> {
    let properties = vhdx.properties();
    let locator = properties.parent?;
    if !names_of(&locator).iter().any(|n| parent == n.as_str()) {
        return None;
    }
    let blocks = properties.geometry.size.div_ceil(u64::from(properties.block_size));
    let empty = (0..blocks).all(|b| vhdx.block_state(b) == BlockState::NotPresent);
    Some(ChildFile { path: vhdx.path().to_owned(), locator, empty })
}

/// Refuses to write a file that has a valid child with data: its DataWriteGuid would change, and the
/// child could never be opened again. Empty children (a leaf prepared and not used, a file just
/// folded away) lose nothing.
pub(super) fn refuse_to_orphan(leaf: &Path, guid: Uuid) -> Result<()> {
    let children = children_of(leaf, &[])?;
    for (path, why) in &children.unreadable {
        tracing::warn!(file = %path.display(), %why, "a disk file in the folder cannot be read");
    }
    match children.files.iter().find(|c| !c.empty && accepts(&c.locator, guid)) {
        None => Ok(()),
        Some(child) => Err(DiskError::State(format!(
            "{} must not be written: {} is its child and holds data; open that file, or delete it",
            leaf.display(),
            child.path.display()
        ))),
    }
}
