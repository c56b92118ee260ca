//! The death of the writing process alone: the page cache keeps everything, in order. Then every
//! acknowledged write must be there, flushed or not, for a guest runs on and believes in it.

use super::*;
use crate::vhdx::pending_file::{AREA, Change, Identity, PendingFile, Place};

const IDENTITY: Identity = Identity { boot: Uuid::from_u128(7), device: 1, inode: 2 };

/// One change of the disk file or of the pending file beside it.
#[derive(Clone)]
enum Step {
    Disk(Event),
    Create,
    Pending(Event),
    Remove,
}

/// The two files as the page cache holds them.
#[derive(Clone)]
struct Cache {
    disk: Image,
    pending: Option<Image>,
}

impl Cache {
    fn apply(&mut self, step: &Step) {
        match (step, &mut self.pending) {
            (Step::Disk(event), _) => self.disk.apply(event),
            (Step::Pending(event), Some(pending)) => pending.apply(event),
            (Step::Pending(_), None) => {}
            (Step::Create, pending) => {
                let mut empty = Image::from_bytes(&[]);
                empty.set_len(2 * AREA);
                *pending = Some(empty);
            }
            (Step::Remove, pending) => *pending = None,
        }
    }
}

/// Both files and everything that happened to them, in order. Clones are the same files.
#[derive(Clone)]
struct Files(Arc<Mutex<(Cache, Vec<Step>)>>);

impl Files {
    fn new(cache: Cache) -> Self {
        Self(Arc::new(Mutex::new((cache, Vec::new()))))
    }

    fn now(&self) -> usize {
        self.0.lock().1.len()
    }

    fn cache(&self) -> Cache {
        self.0.lock().0.clone()
    }

    fn step(&self, step: Step) {
        let (cache, steps) = &mut *self.0.lock();
        cache.apply(&step);
        steps.push(step);
    }

    fn open(&self, access: Access) -> crate::Result<Vhdx> {
        let disk = One { files: self.clone(), pending: false };
        let place: Box<dyn Place> = Box::new(self.clone());
        let path = Path::new("/d/test.avhdx");
        Vhdx::from_parts(path, Box::new(disk), Some((place, IDENTITY)), access)
    }
}

impl Place for Files {
    fn open(&self, _writable: bool) -> io::Result<Option<Box<dyn Storage>>> {
        let there = self.0.lock().0.pending.is_some();
        Ok(there.then(|| Box::new(One { files: self.clone(), pending: true }) as _))
    }

    fn create(&self) -> io::Result<Box<dyn Storage>> {
        self.step(Step::Create);
        Ok(Box::new(One { files: self.clone(), pending: true }))
    }

    fn remove(&self) -> io::Result<()> {
        if self.0.lock().0.pending.is_some() {
            self.step(Step::Remove);
        }
        Ok(())
    }
}

/// One of the two files.
struct One {
    files: Files,
    pending: bool,
}

impl One {
    fn image(&self) -> Recorder {
        let cache = &self.files.0.lock().0;
        let image = if self.pending { cache.pending.clone() } else { Some(cache.disk.clone()) };
        Recorder::new(image.expect("the file is there"))
    }

    fn change(&self, event: Event) {
        self.files.step(if self.pending { Step::Pending(event) } else { Step::Disk(event) });
    }
}

impl Storage for One {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.image().read_exact_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        assert!(offset + buf.len() as u64 <= self.len()?, "a write extends the file");
        self.change(Event::Write { offset, data: buf.into() });
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.change(Event::Sync);
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        self.image().len()
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

/// What is broken on purpose.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Broken {
    Nothing,
    /// Changes are not recorded.
    NoRecord,
    /// Changes are recorded before the payload that they point at is written.
    EarlyRecord,
    /// Records do not count for the FileWriteGuid that an open sets.
    NotAccepted,
}

impl Broken {
    /// The order in which the broken code would have done the steps.
    fn breaks(self, mut steps: Vec<Step>) -> Vec<Step> {
        let is_payload =
            |s: &Step| matches!(s, Step::Disk(Event::Write { offset, .. }) if *offset >= 7 * MIB);
        let is_record =
            |s: &Step| matches!(s, Step::Pending(Event::Write { data, .. }) if data.len() != 96);
        let is_header = |s: &Step| matches!(s, Step::Pending(Event::Write { data, .. }) if data.len() == 96 && data[0] != 0);
        match self {
            Self::Nothing => {}
            Self::NoRecord => steps.retain(|s| !is_record(s)),
            Self::NotAccepted => {
                // The first header of an area opens it, the second one accepts another GUID.
                let mut opened = false;
                steps.retain(|s| {
                    let again = is_header(s) && opened;
                    opened =
                        is_header(s) || (opened && !is_record(s) && !matches!(s, Step::Create));
                    !again
                });
            }
            Self::EarlyRecord => {
                for i in 1..steps.len() {
                    if is_record(&steps[i]) && is_payload(&steps[i - 1]) {
                        steps.swap(i - 1, i);
                    }
                }
            }
        }
        steps
    }
}

struct Acknowledged {
    begin: usize,
    end: usize,
    sectors: Range<u64>,
    value: Value,
}

/// One life of the files. The writer dies at its end with everything open.
fn live(
    files: &Files,
    numbers: &mut Numbers,
    next: &mut Value,
    differencing: bool,
) -> Vec<Acknowledged> {
    let mut done = Vec::new();
    let mut disk = files.open(Access::ReadWrite).unwrap();
    for _ in 0..14 {
        let begin = files.now();
        let absent = if differencing { ABSENT } else { ZERO };
        let mut changed: Vec<(Range<u64>, Value)> = Vec::new();
        match random_op(numbers, differencing) {
            Op::Write(first, n) => {
                *next += 1;
                let data: Vec<u8> =
                    (first..first + n).flat_map(|s| sector_data(*next, s)).collect();
                disk.write_at(place(first), &data).unwrap();
                changed.push((first..first + n, *next));
            }
            Op::Zero(first, n) => {
                disk.write_zeroes(place(first), n * 512).unwrap();
                changed.push((first..first + n, ZERO));
            }
            Op::Release(a, b) => {
                disk.release_blocks(&[HOT[a], HOT[b]]).unwrap();
                for hot in [a as u64, b as u64] {
                    changed.push((hot * PER_BLOCK..hot * PER_BLOCK + sectors_of(hot), absent));
                }
            }
            Op::Reopen => {
                drop(disk);
                disk = files.open(Access::ReadWrite).unwrap();
            }
            Op::Flush => disk.flush().unwrap(),
            Op::Parent | Op::Guid => disk.set_data_write_guid(Uuid::from_u128(9)).unwrap(),
        }
        let end = files.now();
        done.extend(changed.into_iter().map(|(sectors, value)| Acknowledged {
            begin,
            end,
            sectors,
            value,
        }));
    }
    disk.abandon();
    done
}

/// Kills the writer after each of its steps, over three lives, each of which goes on from a kill.
fn deaths(seed: u64, differencing: bool, broken: Broken) -> Result<usize, String> {
    let mut numbers = Numbers(seed);
    let mut cache = Cache { disk: new_file(differencing), pending: None };
    let mut next = 1;
    let mut states = 0;
    for _ in 0..3 {
        let before = found(&cache)?;
        let files = Files::new(cache.clone());
        let done = live(&files, &mut numbers, &mut next, differencing);
        let steps = broken.breaks(files.0.lock().1.clone());
        let survivor = numbers.below(steps.len() as u64 + 1) as usize;
        let mut state = cache.clone();
        for k in 0..=steps.len() {
            let held = found(&state).map_err(|e| format!("seed {seed}, step {k}: {e}"))?;
            let now = if broken == Broken::Nothing { k } else { k.min(files.now()) };
            compare(&before, &done, now, &held)
                .map_err(|e| format!("seed {seed}, step {k}: {e}"))?;
            if numbers.below(5) == 0 {
                recovery(&state, &held, broken)
                    .map_err(|e| format!("seed {seed}, step {k}: {e}"))?;
            }
            states += 1;
            if k == survivor {
                cache = state.clone();
            }
            if let Some(step) = steps.get(k) {
                state.apply(step);
            }
        }
    }
    Ok(states)
}

/// What a read-only open shows.
fn found(cache: &Cache) -> Result<Vec<Value>, String> {
    let disk = Files::new(cache.clone()).open(Access::ReadOnly).map_err(|e| e.to_string())?;
    Ok(values(&disk))
}

/// Every acknowledged change is there, and of the one in progress each sector or none.
fn compare(
    before: &[Value],
    done: &[Acknowledged],
    k: usize,
    held: &[Value],
) -> Result<(), String> {
    let mut expected = before.to_vec();
    for change in done.iter().filter(|c| c.end <= k) {
        expected[change.sectors.start as usize..change.sectors.end as usize].fill(change.value);
    }
    for (sector, (value, expected)) in held.iter().zip(&expected).enumerate() {
        let running = done.iter().any(|c| {
            c.begin < k && k < c.end && c.value == *value && c.sectors.contains(&(sector as u64))
        });
        if value != expected && !running {
            return Err(format!("sector {sector} holds {value}, acknowledged was {expected}"));
        }
    }
    Ok(())
}

/// A writable open keeps what a read-only one shows, whenever it dies itself; and so durably that a
/// power cut after it takes nothing back.
fn recovery(state: &Cache, held: &[Value], broken: Broken) -> Result<(), String> {
    let files = Files::new(state.clone());
    let disk = files.open(Access::ReadWrite).map_err(|e| format!("writable: {e}"))?;
    if values(&disk) != held {
        return Err("a writable open reads something else".to_owned());
    }
    disk.abandon();
    let without = Cache { disk: files.cache().disk, pending: None };
    if found(&without)? != held {
        return Err("the open did not commit what it took over".to_owned());
    }
    let mut half = state.clone();
    for (k, step) in broken.breaks(files.0.lock().1.clone()).iter().enumerate() {
        half.apply(step);
        if found(&half).map_err(|e| format!("recovery killed at {k}: {e}"))? != held {
            return Err(format!("recovery killed at {k} lost something"));
        }
    }
    Ok(())
}

#[test]
fn i5_acknowledged_writes_survive_the_death_of_the_process() {
    for seed in 0..4 {
        for differencing in [false, true] {
            let states =
                deaths(seed, differencing, Broken::Nothing).unwrap_or_else(|e| panic!("{e}"));
            assert!(states > 150, "only {states} states");
        }
    }
}

/// The deaths must find each fault; otherwise the test above proves nothing.
#[test]
fn faults_of_the_pending_file_are_noticed() {
    for broken in [Broken::NoRecord, Broken::EarlyRecord, Broken::NotAccepted] {
        let noticed = (0..8).any(|seed| deaths(seed, true, broken).is_err());
        assert!(noticed, "fault {} was not noticed", broken as u8);
    }
}

#[test]
fn records_of_another_boot_or_file_are_dropped() {
    let mut first = Cache { disk: new_file(true), pending: None };
    let files = Files::new(first.clone());
    let disk = files.open(Access::ReadWrite).unwrap();
    disk.write_at(0, &sector_data(5, 0)).unwrap();
    disk.abandon();
    first = files.cache();
    assert_eq!(found(&first).unwrap()[0], 5);
    let other = Identity { boot: Uuid::from_u128(8), ..IDENTITY };
    for identity in [other, Identity { device: 3, ..IDENTITY }, Identity { inode: 3, ..IDENTITY }] {
        let files = Files::new(first.clone());
        let storage = One { files: files.clone(), pending: false };
        let place: Box<dyn Place> = Box::new(files.clone());
        let path = Path::new("/d/test.avhdx");
        let beside = Some((place, identity));
        let disk = Vhdx::from_parts(path, Box::new(storage), beside, Access::ReadWrite).unwrap();
        assert_eq!(values(&disk)[0], ABSENT);
        assert!(!disk.has_recovered());
        assert!(files.cache().pending.is_none(), "what is of no use is removed");
    }
}

#[test]
fn both_areas_count_in_the_order_of_their_use() {
    let guid = Uuid::from_u128(3);
    let files = Files::new(Cache { disk: new_file(false), pending: None });
    let mut file = PendingFile::new(Box::new(files.clone()), IDENTITY, guid);
    let change = |value| Change::Entry { index: 1, value };
    let found = || PendingFile::find(&files, IDENTITY, guid, false).unwrap().map(|f| f.changes);
    file.record(&[change(1)]).unwrap();
    let area = file.turn().unwrap();
    assert_eq!(file.turn(), None);
    file.record(&[change(2)]).unwrap();
    file.record(&[change(3)]).unwrap();
    assert_eq!(found(), Some(vec![change(1), change(2), change(3)]));
    file.empty(area).unwrap();
    assert_eq!(found(), Some(vec![change(2), change(3)]));
    // The first area again: its old records do not come back.
    let area = file.turn().unwrap();
    file.record(&[change(4)]).unwrap();
    assert_eq!(found(), Some(vec![change(2), change(3), change(4)]));
    file.empty(area).unwrap();
    assert_eq!(found(), Some(vec![change(4)]));
    file.close().unwrap();
    assert_eq!(found(), Some(vec![change(4)]), "not committed: kept");
    assert_eq!(
        PendingFile::find(&files, IDENTITY, Uuid::nil(), false).unwrap().map(|f| f.changes),
        None
    );
    file.discard().unwrap();
    assert_eq!(found(), None);
}

#[test]
fn hostile_records_are_refused_without_a_panic() {
    let start = new_file(true);
    let mut numbers = Numbers(1);
    let guid =
        open(&Recorder::new(start.clone()), Access::ReadOnly).unwrap().properties().file_write_guid;
    for _ in 0..300 {
        let files = Files::new(Cache { disk: start.clone(), pending: None });
        let mut file = PendingFile::new(Box::new(files.clone()), IDENTITY, guid);
        for _ in 0..1 + numbers.below(4) {
            let some = |n: &mut Numbers| match n.below(4) {
                0 => u64::MAX - n.below(9),
                1 => n.below(1 << 40) << 20 | n.below(8),
                _ => n.below(2000),
            };
            let (a, b) = (some(&mut numbers), some(&mut numbers));
            let change = match numbers.below(2) {
                0 => Change::Entry { index: a, value: b },
                _ => Change::Sectors { first: a, count: b, present: true },
            };
            file.record(&[change]).unwrap();
        }
        for access in [Access::ReadOnly, Access::ReadWrite] {
            match Files::new(files.cache()).open(access) {
                Ok(disk) => drop(disk.presence(0, SIZE).unwrap()),
                Err(error) => assert!(error.to_string().contains(".pending"), "{error}"),
            }
        }
    }
}
