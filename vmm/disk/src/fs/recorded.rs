//! A folder in memory that records every write, sync and change of a name, and gives the states that
//! a crash at any moment may leave.
//!
//! A write or a change of length is certain once its file was synced, a change of a name once the
//! folder was. Until then a crash keeps or loses each of them on its own, and of a write perhaps only
//! some sectors: file systems promise no more.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use uuid::Uuid;

use super::{Found, How};
use crate::rct::Media;
use crate::vhdx::Access;
use crate::vhdx::storage::Storage;

const PAGE: usize = 4096;
const SECTOR: usize = 512;
/// Where recorded folders seem to lie.
const ROOT: &str = "/recorded";

/// A sparse file's content; copies share what neither has changed.
#[derive(Clone, Default)]
pub(crate) struct Image {
    len: u64,
    pages: Arc<BTreeMap<u64, Arc<[u8; PAGE]>>>,
}

impl Image {
    fn read(&self, buf: &mut [u8], offset: u64) {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let within = (at % PAGE as u64) as usize;
            let n = (PAGE - within).min(buf.len() - done);
            let part = &mut buf[done..done + n];
            match self.pages.get(&(at / PAGE as u64)) {
                Some(page) => part.copy_from_slice(&page[within..within + n]),
                None => part.fill(0),
            }
            done += n;
        }
    }

    /// What lies beyond the end is lost: the length that had room for it did not make it.
    fn write(&mut self, data: &[u8], offset: u64) {
        let n = data.len().min(self.len.saturating_sub(offset) as usize);
        let pages = Arc::make_mut(&mut self.pages);
        let mut done = 0;
        while done < n {
            let at = offset + done as u64;
            let within = (at % PAGE as u64) as usize;
            let part = &data[done..done + (PAGE - within).min(n - done)];
            done += part.len();
            let number = at / PAGE as u64;
            if !pages.contains_key(&number) && part.iter().all(|b| *b == 0) {
                continue;
            }
            let page = pages.entry(number).or_insert_with(|| Arc::new([0; PAGE]));
            Arc::make_mut(page)[within..within + part.len()].copy_from_slice(part);
        }
    }

    fn punch(&mut self, offset: u64, len: u64) {
        let page = PAGE as u64;
        assert!(offset.is_multiple_of(page) && len.is_multiple_of(page));
        Arc::make_mut(&mut self.pages).retain(|n, _| !(offset..offset + len).contains(&(n * page)));
    }

    fn set_len(&mut self, len: u64) {
        if len < self.len {
            assert!(len.is_multiple_of(PAGE as u64));
            Arc::make_mut(&mut self.pages).split_off(&(len / PAGE as u64));
        }
        self.len = len;
    }
}

/// Something that happened in the folder. Files are known by number, names come and go.
#[derive(Clone)]
pub(crate) enum Event {
    Write {
        file: usize,
        offset: u64,
        data: Arc<[u8]>,
    },
    Punch {
        file: usize,
        offset: u64,
        len: u64,
    },
    SetLen {
        file: usize,
        len: u64,
    },
    Sync {
        file: usize,
    },
    /// The event before this one, a write, is durable.
    SyncWrite,
    Create {
        file: usize,
        name: OsString,
    },
    Remove {
        name: OsString,
    },
    Rename {
        from: OsString,
        to: OsString,
    },
    SyncFolder,
}

impl Event {
    fn file(&self) -> Option<usize> {
        match self {
            Self::Write { file, .. } | Self::Punch { file, .. } | Self::SetLen { file, .. } => {
                Some(*file)
            }
            _ => None,
        }
    }

    fn overlaps(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Write { file, offset, data }, Self::Write { file: f, offset: o, data: d }) => {
                file == f && *offset < o + d.len() as u64 && *o < offset + data.len() as u64
            }
            _ => false,
        }
    }
}

/// What a crash makes of an event that was not synced.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fate {
    Lost,
    Whole,
    /// Of a write only the sectors with their bit set (by number, repeating) arrived.
    Torn(u64),
}

/// The folder's content.
#[derive(Clone, Default)]
pub(crate) struct Snapshot {
    files: Vec<Image>,
    /// First name of each file.
    born: Vec<OsString>,
    names: BTreeMap<OsString, usize>,
}

impl Snapshot {
    fn image(&mut self, file: usize) -> &mut Image {
        if self.files.len() <= file {
            self.files.resize_with(file + 1, Image::default);
            self.born.resize_with(file + 1, OsString::new);
        }
        &mut self.files[file]
    }

    fn apply(&mut self, event: &Event, fate: Fate) {
        match (event, fate) {
            (_, Fate::Lost) => {}
            (Event::Write { file, offset, data }, Fate::Torn(sectors)) => {
                for (i, sector) in data.chunks(SECTOR).enumerate() {
                    if sectors & (1 << (i % 64)) != 0 {
                        self.image(*file).write(sector, offset + (i * SECTOR) as u64);
                    }
                }
            }
            (Event::Write { file, offset, data }, _) => self.image(*file).write(data, *offset),
            (Event::Punch { file, offset, len }, _) => self.image(*file).punch(*offset, *len),
            (Event::SetLen { file, len }, _) => self.image(*file).set_len(*len),
            (Event::Create { file, name }, _) => {
                self.image(*file);
                self.born[*file].clone_from(name);
                self.names.insert(name.clone(), *file);
            }
            (Event::Remove { name }, _) => drop(self.names.remove(name)),
            (Event::Rename { from, to }, _) => {
                // Its creation may have been lost.
                if let Some(file) = self.names.remove(from) {
                    self.names.insert(to.clone(), file);
                }
            }
            (Event::Sync { .. } | Event::SyncWrite | Event::SyncFolder, _) => {}
        }
    }
}

#[derive(Default)]
struct State {
    start: Snapshot,
    now: Snapshot,
    events: Vec<Event>,
    /// Readers of each file; -1 for a writer.
    locks: BTreeMap<usize, i32>,
}

struct Folder {
    path: PathBuf,
    state: Mutex<State>,
    broken: Option<Broken>,
    /// Of the kernel: a power cut begins another.
    boot: Uuid,
}

/// An ordering rule that is not obeyed in a folder: crash tests must notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Broken {
    /// One of the chain's.
    Chain(crate::chain::Rule),
    /// One of the tracking files'.
    Tracking(crate::rct::Rule),
}

static FOLDERS: Mutex<BTreeMap<PathBuf, Weak<Folder>>> = Mutex::new(BTreeMap::new());
static MADE: AtomicU64 = AtomicU64::new(0);

/// A recorded folder; clones are the same one.
#[derive(Clone)]
pub(crate) struct Recorded(Arc<Folder>);

impl Drop for Folder {
    fn drop(&mut self) {
        FOLDERS.lock().remove(&self.path);
    }
}

/// The recorded folder that a path lies in.
pub(super) fn find(path: &Path) -> Option<Recorded> {
    find_folder(path.parent()?)
}

pub(super) fn find_folder(folder: &Path) -> Option<Recorded> {
    if !folder.starts_with(ROOT) {
        return None;
    }
    FOLDERS.lock().get(folder)?.upgrade().map(Recorded)
}

/// What is broken on purpose where `path` lies.
pub(crate) fn broken(path: &Path) -> Option<Broken> {
    find(path)?.0.broken
}

fn name_of(path: &Path) -> OsString {
    path.file_name().map(OsStr::to_owned).unwrap_or_default()
}

impl Recorded {
    /// A folder with this content, all of it durable.
    pub(crate) fn new(start: Snapshot, broken: Option<Broken>) -> Self {
        Self::with(State { now: start.clone(), start, ..State::default() }, broken, Uuid::new_v4())
    }

    fn with(state: State, broken: Option<Broken>, boot: Uuid) -> Self {
        let path = Path::new(ROOT).join(MADE.fetch_add(1, Ordering::Relaxed).to_string());
        let folder =
            Arc::new(Folder { path: path.clone(), state: Mutex::new(state), broken, boot });
        FOLDERS.lock().insert(path, Arc::downgrade(&folder));
        Self(folder)
    }

    /// The folder after the process was killed at `at`: everything is there to read, and what was not
    /// synced still is not.
    pub(crate) fn killed(&self, at: usize) -> Self {
        let state = self.0.state.lock();
        let mut now = state.start.clone();
        let events = state.events[..at].to_vec();
        events.iter().for_each(|event| now.apply(event, Fate::Whole));
        let start = state.start.clone();
        drop(state);
        Self::with(State { start, now, events, ..State::default() }, self.0.broken, self.0.boot)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0.path
    }

    /// What is broken on purpose in it.
    pub(crate) fn broken(&self) -> Option<Broken> {
        self.0.broken
    }

    /// Events so far.
    pub(crate) fn len(&self) -> usize {
        self.0.state.lock().events.len()
    }

    /// The states that crashes leave, from the first event on.
    pub(crate) fn crashes(&self) -> Crashes {
        let state = self.0.state.lock();
        Crashes {
            durable: state.start.clone(),
            born: state.now.born.clone(),
            events: state.events.clone(),
            at: 0,
            open: Vec::new(),
        }
    }

    fn happen(&self, event: Event) {
        let state = &mut *self.0.state.lock();
        state.now.apply(&event, Fate::Whole);
        state.events.push(event);
    }

    /// A write and its sync, with nothing of another thread in between.
    fn write_durable(&self, event: Event) {
        let state = &mut *self.0.state.lock();
        state.now.apply(&event, Fate::Whole);
        state.events.extend([event, Event::SyncWrite]);
    }

    pub(super) fn open(&self, path: &Path, how: How) -> io::Result<Handle> {
        let name = name_of(path);
        let state = self.0.state.lock();
        let file = match (state.now.names.get(&name), how.create) {
            (Some(_), Some(_)) => return Err(io::ErrorKind::AlreadyExists.into()),
            (Some(file), None) => *file,
            (None, None) => return Err(io::ErrorKind::NotFound.into()),
            (None, Some(_)) => {
                let file = state.now.files.len();
                drop(state);
                self.happen(Event::Create { file, name });
                file
            }
        };
        Ok(Handle { folder: self.clone(), file, lock: Mutex::new(0) })
    }

    pub(super) fn remove(&self, path: &Path) -> io::Result<()> {
        if !self.contains(path) {
            return Err(io::ErrorKind::NotFound.into());
        }
        self.happen(Event::Remove { name: name_of(path) });
        Ok(())
    }

    pub(super) fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        assert_eq!(from.parent(), to.parent(), "renames stay in one folder");
        if !self.contains(from) {
            return Err(io::ErrorKind::NotFound.into());
        }
        self.happen(Event::Rename { from: name_of(from), to: name_of(to) });
        Ok(())
    }

    pub(super) fn sync_folder(&self) {
        self.happen(Event::SyncFolder);
    }

    pub(super) fn contains(&self, path: &Path) -> bool {
        self.0.state.lock().now.names.contains_key(&name_of(path))
    }

    pub(super) fn list(&self) -> Vec<Found> {
        let state = self.0.state.lock();
        let found = |(name, file): (&OsString, &usize)| Found {
            name: name.clone(),
            regular: true,
            len: Some(state.now.files[*file].len),
        };
        state.now.names.iter().map(found).collect()
    }
}

/// Walks along what happened.
#[derive(Clone)]
pub(crate) struct Crashes {
    durable: Snapshot,
    /// First name of each file.
    born: Vec<OsString>,
    events: Vec<Event>,
    at: usize,
    /// Events that a crash here may lose.
    open: Vec<usize>,
}

impl Crashes {
    /// Goes on along `longer`, which begins with the same events.
    pub(crate) fn continued(mut self, longer: &Recorded) -> Self {
        let state = longer.0.state.lock();
        self.events.clone_from(&state.events);
        self.born.clone_from(&state.now.born);
        drop(state);
        self
    }

    /// Passes one event; `honest` is false where a sync does nothing.
    pub(crate) fn pass(&mut self, honest: impl Fn(&Event) -> bool) {
        let event = &self.events[self.at];
        let (events, at) = (&self.events, self.at);
        let done: Box<dyn Fn(usize) -> bool> = match event {
            Event::Sync { file } => Box::new(|i| events[i].file() == Some(*file)),
            // Older data of the same place cannot come after it any more.
            Event::SyncWrite => Box::new(|i| i + 1 == at || events[i].overlaps(&events[at - 1])),
            Event::SyncFolder => Box::new(|i| events[i].file().is_none()),
            _ => {
                self.open.push(self.at);
                self.at += 1;
                return;
            }
        };
        if honest(event) {
            let durable = &mut self.durable;
            self.open.retain(|&i| {
                if done(i) {
                    durable.apply(&events[i], Fate::Whole);
                }
                !done(i)
            });
        }
        self.at += 1;
    }

    /// Events passed.
    pub(crate) fn at(&self) -> usize {
        self.at
    }

    pub(crate) fn ended(&self) -> bool {
        self.at == self.events.len()
    }

    /// How many events a crash here may lose.
    pub(crate) fn open(&self) -> usize {
        self.open.len()
    }

    /// What a crash here leaves; `fate` learns the first name of the file that an event changes, if it
    /// changes one.
    pub(crate) fn state(&self, mut fate: impl FnMut(Option<&OsStr>) -> Fate) -> Snapshot {
        let mut state = self.durable.clone();
        for &i in &self.open {
            let event = &self.events[i];
            let of = event.file().and_then(|f| self.born.get(f));
            state.apply(event, fate(of.map(OsString::as_os_str)));
        }
        state
    }

    /// The last event passed, for reports.
    pub(crate) fn describe(&self) -> String {
        match self.at.checked_sub(1).map(|i| &self.events[i]) {
            None => "nothing".to_owned(),
            Some(Event::Write { file, offset, data }) => {
                format!("write of {} at {offset} of file {file}", data.len())
            }
            Some(Event::Punch { file, .. }) => format!("punch in file {file}"),
            Some(Event::SetLen { file, len }) => format!("length {len} of file {file}"),
            Some(Event::Sync { file }) => format!("sync of file {file}"),
            Some(Event::SyncWrite) => "durable write".to_owned(),
            Some(Event::Create { file, name }) => {
                format!("creation of {} as {file}", name.display())
            }
            Some(Event::Remove { name }) => format!("removal of {}", name.display()),
            Some(Event::Rename { from, to }) => {
                format!("renaming of {} to {}", from.display(), to.display())
            }
            Some(Event::SyncFolder) => "sync of the folder".to_owned(),
        }
    }
}

/// An open file, real or recorded.
pub(crate) enum DiskFile {
    Real(File),
    Recorded(Handle),
}

/// An open recorded file.
pub(crate) struct Handle {
    folder: Recorded,
    file: usize,
    /// 0: none, 1: shared, -1: exclusive.
    lock: Mutex<i32>,
}

impl Handle {
    fn unlock(&self) {
        let held = std::mem::take(&mut *self.lock.lock());
        if held != 0
            && let Some(count) = self.folder.0.state.lock().locks.get_mut(&self.file)
        {
            *count -= held;
        }
    }

    /// Recorded files never fail.
    #[allow(clippy::unnecessary_wraps)]
    fn happen(&self, event: Event) -> io::Result<()> {
        self.folder.happen(event);
        Ok(())
    }

    fn len(&self) -> u64 {
        self.folder.0.state.lock().now.files[self.file].len
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let state = self.folder.0.state.lock();
        let image = &state.now.files[self.file];
        if offset + buf.len() as u64 > image.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        image.read(buf, offset);
        Ok(())
    }

    pub(super) fn boot(&self) -> Uuid {
        self.folder.0.boot
    }

    pub(super) fn number(&self) -> u64 {
        self.file as u64
    }

    fn write(&self, buf: &[u8], offset: u64) -> Event {
        let end = offset + buf.len() as u64;
        if end > self.len() {
            self.folder.happen(Event::SetLen { file: self.file, len: end });
        }
        Event::Write { file: self.file, offset, data: buf.into() }
    }

    fn lock(&self, access: Access) -> bool {
        self.unlock();
        let mut state = self.folder.0.state.lock();
        let count = state.locks.entry(self.file).or_default();
        let (free, mine) = match access {
            Access::ReadOnly => (*count >= 0, 1),
            Access::ReadWrite => (*count == 0, -1),
        };
        if free {
            *count += mine;
            *self.lock.lock() = mine;
        }
        free
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.unlock();
    }
}

impl Storage for DiskFile {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        match self {
            Self::Real(file) => Storage::read_exact_at(file, buf, offset),
            Self::Recorded(handle) => handle.read(buf, offset),
        }
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        match self {
            Self::Real(file) => Storage::write_all_at(file, buf, offset),
            Self::Recorded(handle) => handle.happen(handle.write(buf, offset)),
        }
    }

    fn sync(&self) -> io::Result<()> {
        match self {
            Self::Real(file) => Storage::sync(file),
            Self::Recorded(handle) => handle.happen(Event::Sync { file: handle.file }),
        }
    }

    fn len(&self) -> io::Result<u64> {
        match self {
            Self::Real(file) => Storage::len(file),
            Self::Recorded(handle) => Ok(handle.len()),
        }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        match self {
            Self::Real(file) => Storage::set_len(file, len),
            Self::Recorded(handle) => handle.happen(Event::SetLen { file: handle.file, len }),
        }
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        match self {
            Self::Real(file) => Storage::punch(file, offset, len),
            Self::Recorded(handle) => {
                handle.happen(Event::Punch { file: handle.file, offset, len })
            }
        }
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        match self {
            Self::Real(file) => Storage::reserve(file, offset, len),
            Self::Recorded(_) => Ok(()),
        }
    }

    fn lock(&self, access: Access) -> io::Result<bool> {
        match self {
            Self::Real(file) => Storage::lock(file, access),
            Self::Recorded(handle) => Ok(handle.lock(access)),
        }
    }
}

impl Media for DiskFile {
    fn len(&self) -> io::Result<u64> {
        Storage::len(self)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        Storage::read_exact_at(self, buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        Storage::write_all_at(self, buf, offset)
    }

    fn write_durable(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        match self {
            Self::Real(file) => Media::write_durable(file, buf, offset),
            Self::Recorded(handle) => {
                handle.folder.write_durable(handle.write(buf, offset));
                Ok(())
            }
        }
    }

    fn sync(&self) -> io::Result<()> {
        Storage::sync(self)
    }
}
