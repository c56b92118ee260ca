//! A file in memory that records every change, and what of it a crash may leave.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::super::storage::Storage;
use super::*;

const PAGE: usize = 4096;
const SECTOR: usize = 512;

/// A sparse file's content.
#[derive(Clone, Default)]
pub(super) struct Image {
    len: u64,
    pages: BTreeMap<u64, Arc<[u8; PAGE]>>,
}

impl Image {
    pub(super) fn from_bytes(bytes: &[u8]) -> Self {
        let mut image = Self { len: bytes.len() as u64, pages: BTreeMap::new() };
        image.write(bytes, 0);
        image
    }

    pub(super) fn overwrite(&mut self, bytes: &[u8]) {
        self.write(bytes, 0);
    }

    /// The first bytes, however long the file is.
    pub(super) fn to_bytes(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read(&mut bytes, 0);
        bytes
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

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

    /// What lies beyond the end is lost: the size that had room for it did not make it.
    fn write(&mut self, data: &[u8], offset: u64) {
        let n = data.len().min(self.len.saturating_sub(offset) as usize);
        let mut done = 0;
        while done < n {
            let at = offset + done as u64;
            let within = (at % PAGE as u64) as usize;
            let part = (PAGE - within).min(n - done);
            let page = self.pages.entry(at / PAGE as u64).or_insert_with(|| Arc::new([0; PAGE]));
            Arc::make_mut(page)[within..within + part].copy_from_slice(&data[done..done + part]);
            done += part;
        }
    }

    fn punch(&mut self, offset: u64, len: u64) {
        let page = PAGE as u64;
        assert!(offset.is_multiple_of(page) && len.is_multiple_of(page));
        let mut rest = self.pages.split_off(&(offset / page));
        self.pages.append(&mut rest.split_off(&((offset + len) / page)));
    }

    pub(super) fn set_len(&mut self, len: u64) {
        assert!(len.is_multiple_of(PAGE as u64));
        self.pages.split_off(&(len / PAGE as u64));
        self.len = len;
    }

    pub(super) fn apply(&mut self, event: &Event) {
        match event {
            Event::Write { offset, data } => self.write(data, *offset),
            Event::Punch { offset, len } => self.punch(*offset, *len),
            Event::SetLen(len) => self.set_len(*len),
            Event::Sync => {}
        }
    }

    /// Only some sectors of a write arrive.
    pub(super) fn apply_torn(&mut self, event: &Event, mut keep: impl FnMut() -> bool) {
        let Event::Write { offset, data } = event else {
            if keep() {
                self.apply(event);
            }
            return;
        };
        for (i, sector) in data.chunks(SECTOR).enumerate() {
            if keep() {
                self.write(sector, offset + (i * SECTOR) as u64);
            }
        }
    }
}

/// One change of the file.
#[derive(Clone)]
pub(super) enum Event {
    Write { offset: u64, data: Arc<[u8]> },
    Punch { offset: u64, len: u64 },
    SetLen(u64),
    Sync,
}

/// The file under test; clones are the same file.
#[derive(Clone, Default)]
pub(super) struct Recorder(Arc<Mutex<(Image, Vec<Event>)>>, Arc<AtomicU64>);

impl Recorder {
    pub(super) fn new(image: Image) -> Self {
        Self(Arc::new(Mutex::new((image, Vec::new()))), Arc::default())
    }

    /// Behaves as if another thread extended the file just after the next sync.
    pub(super) fn extend_after_sync(&self, len: u64) {
        self.1.store(len, Ordering::Relaxed);
    }

    /// The number of changes so far.
    pub(super) fn now(&self) -> usize {
        self.0.lock().1.len()
    }

    pub(super) fn events(&self) -> Vec<Event> {
        self.0.lock().1.clone()
    }

    pub(super) fn image(&self) -> Image {
        self.0.lock().0.clone()
    }

    fn change(&self, event: Event) {
        let (image, events) = &mut *self.0.lock();
        image.apply(&event);
        events.push(event);
    }
}

impl Storage for Recorder {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let image = &self.0.lock().0;
        if offset + buf.len() as u64 > image.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        image.read(buf, offset);
        Ok(())
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        assert!(offset + buf.len() as u64 <= self.0.lock().0.len, "a write extends the file");
        self.change(Event::Write { offset, data: buf.into() });
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.change(Event::Sync);
        match self.1.swap(0, Ordering::Relaxed) {
            0 => Ok(()),
            len => self.set_len(len),
        }
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().0.len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Event::SetLen(len));
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.change(Event::Punch { offset, len });
        Ok(())
    }

    fn reserve(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn lock(&self, _access: Access) -> io::Result<bool> {
        Ok(true)
    }
}
