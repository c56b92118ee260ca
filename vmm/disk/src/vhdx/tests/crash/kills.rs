//! The states that kills leave, and what must hold in each.

use super::*;

/// Goes through the kills of a life.
pub(super) struct Kills<'a> {
    life: &'a Life,
    numbers: Numbers,
    /// What is certain to be in the file.
    durable: Image,
    /// What may be.
    unsynced: Vec<Event>,
    /// The sectors' values after the last flush that has ended.
    flushed: Vec<Value>,
    /// Changes in `flushed`.
    included: usize,
    /// States looked at.
    pub(super) states: usize,
    /// One of them, to go on from.
    pub(super) survivor: Option<Image>,
}

impl<'a> Kills<'a> {
    pub(super) fn new(life: &'a Life, seed: u64) -> Self {
        Self {
            life,
            numbers: Numbers(seed),
            durable: life.start.clone(),
            unsynced: Vec::new(),
            flushed: life.values.clone(),
            included: 0,
            states: 0,
            survivor: None,
        }
    }

    /// Kills at every event.
    pub(super) fn all(&mut self) -> Result<(), String> {
        let events = self.life.recorder.events();
        for (k, event) in events.iter().enumerate() {
            self.kill(k)?;
            match event {
                Event::Sync => self.sync(events.get(k + 1)),
                _ => self.unsynced.push(event.clone()),
            }
        }
        self.kill(events.len())
    }

    fn sync(&mut self, next: Option<&Event>) {
        let next_is = |range: Range<u64>| matches!(next, Some(Event::Write { offset, .. }) if range.contains(offset));
        if self.life.fault == Fault::LostPayloadSync && next_is(MIB..5 * MIB) {
            return;
        }
        let forget = self.life.fault == Fault::LostPageSync && !next_is(0..MIB);
        let (late, done): (Vec<_>, Vec<_>) = std::mem::take(&mut self.unsynced).into_iter().partition(
            |e| forget && matches!(e, Event::Write { offset, .. } if (5 * MIB..7 * MIB).contains(offset)),
        );
        done.iter().for_each(|event| self.durable.apply(event));
        self.unsynced = late;
    }

    /// The process ends after `k` events.
    fn kill(&mut self, k: usize) -> Result<(), String> {
        let ended = self.life.flushes.iter().rev().find(|(end, _)| *end <= k).unwrap().1;
        for change in &self.life.changes[self.included.min(ended)..ended] {
            self.flushed[change.sectors.start as usize..change.sectors.end as usize]
                .fill(change.value);
        }
        self.included = self.included.max(ended);
        let ways = if self.unsynced.is_empty() { 1 } else { 4 };
        for way in 0..ways {
            let image = self.image(way);
            self.states += 1;
            let thorough = self.numbers.below(4) == 0;
            self.verify(k, &image, thorough).map_err(|e| {
                format!("killed at event {k} of {}, way {way}: {e}", self.life.recorder.now())
            })?;
            if self.numbers.below(self.states as u64) == 0 {
                self.survivor = Some(image);
            }
        }
        Ok(())
    }

    /// What the file system kept: everything, nothing, or this and that.
    fn image(&mut self, way: u64) -> Image {
        let mut image = self.durable.clone();
        let numbers = &mut self.numbers;
        for event in &self.unsynced {
            match (way, numbers.below(4)) {
                (0, _) | (3, 0..2) => image.apply(event),
                (1, _) | (2, 0) | (3, 2) => {}
                (2, 1) => image.apply(event),
                _ => image.apply_torn(event, || numbers.below(2) == 0),
            }
        }
        image
    }

    fn verify(&mut self, k: usize, image: &Image, thorough: bool) -> Result<(), String> {
        let found = look(image)?;
        self.compare(k, &found)?;
        if !thorough {
            return Ok(());
        }
        // Recovery reads the same, is stable, and may be killed itself.
        let file = Recorder::new(image.clone());
        let disk = open(&file, Access::ReadWrite).map_err(|e| format!("writable: {e}"))?;
        if values(&disk) != found.0 {
            return Err("a writable open reads something else".to_owned());
        }
        drop(disk);
        if look(&file.image())? != found {
            return Err("recovery changed something".to_owned());
        }
        let events = file.events();
        let end = self.numbers.below(events.len() as u64 + 1) as usize;
        let mut half = image.clone();
        let synced = events[..end].iter().rposition(|e| matches!(e, Event::Sync)).unwrap_or(0);
        events[..synced].iter().for_each(|event| half.apply(event));
        for event in &events[synced..end] {
            half.apply_torn(event, || self.numbers.below(2) == 0);
        }
        if look(&half).map_err(|e| format!("recovery killed at {end}: {e}"))? != found {
            return Err(format!("recovery killed at {end} changed something"));
        }
        Ok(())
    }

    fn compare(&self, k: usize, (found, guid, parent): &Found) -> Result<(), String> {
        let later: Vec<&Change> =
            self.life.changes[self.included..].iter().filter(|c| c.begin < k).collect();
        for (sector, (value, flushed)) in found.iter().zip(&self.flushed).enumerate() {
            let allowed = value == flushed
                || later.iter().any(|c| c.value == *value && c.sectors.contains(&(sector as u64)));
            if !allowed {
                return Err(format!(
                    "sector {} of block {} holds {value}, flushed was {flushed}",
                    sector as u64 % PER_BLOCK,
                    HOT[sector / PER_BLOCK as usize]
                ));
            }
        }
        let possible = |settings: &[Setting], value: &Uuid| {
            let done = settings.iter().rev().find(|s| s.end <= k).unwrap();
            done.value == *value
                || settings.iter().any(|s| s.begin < k && s.end > k && s.value == *value)
        };
        if !possible(&self.life.guids, guid) || !possible(&self.life.parents, parent) {
            return Err(format!("data write guid {guid}, parent {parent}"));
        }
        Ok(())
    }
}

type Found = (Vec<Value>, Uuid, Uuid);

/// What a read-only open finds.
fn look(image: &Image) -> Result<Found, String> {
    let disk = open(&Recorder::new(image.clone()), Access::ReadOnly).map_err(|e| e.to_string())?;
    let p = disk.properties();
    for block in (0..disk.blocks()).filter(|block| !HOT.contains(block)) {
        if disk.block_state(block) != BlockState::NotPresent {
            return Err(format!("block {block} appeared"));
        }
    }
    Ok((values(&disk), p.data_write_guid, p.parent.map_or(Uuid::nil(), |l| l.linkage)))
}
