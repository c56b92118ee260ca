//! Power cuts and kills at every moment of a chain's life, with everything recorded that reaches the
//! file system: VHDX files, tracking files, and the folder. Whatever the file system kept of what was
//! not synced: the chain opens; it holds every flushed byte, or one written later; nothing is where it
//! was never written; "changed since" contains what differs, for every id that was told (I3); and the
//! disk can be written and merged further.
//!
//! Each ordering rule of the chain is then switched off in turn, and the same search must find it.

mod life;
mod places;
mod states;

use std::ops::Range;
use std::sync::LazyLock;

use self::life::{Caller, Life};
use self::states::{Depth, Explorer, Tally};
use crate::chain::Rule;
use crate::fs::recorded::{Broken, Event};
use crate::rct::Rule as TrackingRule;

/// What is wrong on purpose.
#[derive(Debug, Clone, Copy)]
struct Fault {
    broken: Option<Broken>,
    caller: Caller,
    /// Which syncs do what they should.
    honest: fn(&Event) -> bool,
    live: fn(&mut Life) -> crate::Result<()>,
}

const NONE: Fault =
    Fault { broken: None, caller: Caller::Right, honest: |_| true, live: |life| life.live(30) };

/// The lives without a fault; those with one are the same, and some more should these not show it.
const SEEDS: Range<u64> = 100..102;

/// More of everything, for `make crash`: a factor.
static EFFORT: LazyLock<u64> = LazyLock::new(|| {
    std::env::var("TIDEMARK_CRASH").ok().and_then(|v| v.parse().ok()).unwrap_or(1)
});

/// The lives of one disk.
fn lives(seed: u64, fault: Fault, depth: Depth) -> Result<Tally, String> {
    let failed = |life: u32| move |e: crate::DiskError| format!("seed {seed}, life {life}: {e}");
    let mut total = Tally::default();
    let mut life = Life::begin(seed, fault.broken, fault.caller).map_err(failed(0))?;
    for number in 0..depth.lives {
        (fault.live)(&mut life).map_err(failed(number))?;
        let model = life.model.lock();
        let mut explorer = Explorer::new(&life, &model, seed, fault.honest);
        let explored = explorer.all(depth);
        explored.map_err(|e| format!("seed {seed}, life {number}: {e}"))?;
        total.add(explorer.tally);
        let Some((at, state)) = explorer.survivor.take() else { break };
        drop(model);
        life = life.resume(at, state).map_err(failed(number))?;
    }
    Ok(total)
}

fn survive(fault: Fault, depth: Depth) -> Tally {
    let mut total = Tally::default();
    let more = (SEEDS.end - SEEDS.start) * *EFFORT;
    for seed in SEEDS.start..SEEDS.start + more {
        total.add(lives(seed, fault, depth).unwrap_or_else(|e| panic!("{e}")));
    }
    total
}

#[test]
fn i3_i5_a_chain_survives_a_crash_after_any_event() {
    let depth = Depth { lives: 3, samples: 5, stride: if *EFFORT > 1 { 1 } else { 9 }, kills: 5 };
    let mut tally = survive(NONE, depth);
    tally.add(survive(Fault { live: Life::fold_leaves, ..NONE }, depth));
    println!("{} states, {} of them sampled subsets", tally.states, tally.sampled);
    assert!(tally.sampled >= 10_000, "only {} subsets", tally.sampled);
}

/// What the search says of a fault, in many short lives.
fn found(fault: Fault) -> String {
    found_at(fault, Depth { lives: 1, samples: 0, stride: 6, kills: 12 })
}

fn found_at(fault: Fault, depth: Depth) -> String {
    let seeds = SEEDS.start..SEEDS.start + 60;
    let said = seeds.into_iter().find_map(|seed| lives(seed, fault, depth).err());
    said.expect("the crashes do not show it")
}

fn broken(rule: Rule) -> Fault {
    Fault { broken: Some(Broken::Chain(rule)), ..NONE }
}

/// One test for each rule, so that they run side by side.
macro_rules! rules_are_needed {
    ($($name:ident: $fault:expr;)*) => {
        $(#[test]
        fn $name() {
            println!("{}", found($fault));
        })*
    };
}

rules_are_needed! {
    announce_before_guid_is_needed: broken(Rule::AnnounceBeforeGuid);
    child_names_guid_is_needed: broken(Rule::ChildNamesGuid);
    mark_what_is_copied_is_needed: broken(Rule::MarkWhatIsCopied);
    sync_before_release_is_needed: broken(Rule::SyncBeforeRelease);
    mirror_what_is_copied_is_needed: broken(Rule::MirrorWhatIsCopied);
    track_in_child_is_needed: Fault { live: Life::fold_leaves, ..broken(Rule::TrackInChild) };
    track_in_parent_is_needed: broken(Rule::TrackInParent);
    flush_every_file_is_needed: broken(Rule::FlushEveryFile);
    adopt_before_forget_is_needed: Fault { live: Life::fold_leaves, ..broken(Rule::AdoptBeforeForget) };
    forget_before_parent_alone_is_needed: Fault { live: Life::fold_leaves, ..broken(Rule::ForgetBeforeParentAlone) };
    repoint_before_leave_is_needed:
        Fault { live: Life::fold_middles, ..broken(Rule::RepointBeforeLeave) };
    settling_before_the_id_is_told_is_needed: Fault { caller: Caller::TellsEarly, ..NONE };
    recording_before_deletion_is_needed: Fault { caller: Caller::DeletesEarly, ..NONE };
    folder_syncs_are_needed: Fault { honest: |e| !matches!(e, Event::SyncFolder), ..NONE };
}

#[test]
fn sync_what_was_found_is_needed() {
    // It takes a kill first.
    let depth = Depth { lives: 1, samples: 0, stride: 12, kills: 1 };
    println!("{}", found_at(broken(Rule::SyncWhatWasFound), depth));
}

fn tracking(rule: TrackingRule) -> Fault {
    Fault { broken: Some(Broken::Tracking(rule)), ..NONE }
}

rules_are_needed! {
    open_before_writes_is_needed: tracking(TrackingRule::OpenBeforeWrites);
    bit_before_write_is_needed: tracking(TrackingRule::BitBeforeWrite);
    pages_before_clear_is_needed: tracking(TrackingRule::PagesBeforeClear);
    seal_is_durable_is_needed: tracking(TrackingRule::SealIsDurable);
    pages_before_clean_is_needed: tracking(TrackingRule::PagesBeforeClean);
    recovery_before_clear_is_needed: tracking(TrackingRule::RecoveryBeforeClear);
}
