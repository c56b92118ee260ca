use super::*;
use parking_lot::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

static CANCEL: AtomicBool = AtomicBool::new(false);

fn steps(n: u64) -> impl Iterator<Item = Result<Step>> + Send {
    (0..n).map(|i| {
        let range = i * PIECE..(i + 1) * PIECE;
        Ok(if i % 7 == 3 { Step::Zero(range) } else { Step::Read(range) })
    })
}

fn stamp(offset: u64, buf: &mut [u8]) -> Result<()> {
    buf.fill((offset / PIECE) as u8);
    Ok(())
}

#[test]
fn pieces_arrive_in_order_with_their_content() {
    let mut next = 0;
    let slow_first = |offset: u64, buf: &mut [u8]| {
        if offset.is_multiple_of(4 * PIECE) {
            std::thread::sleep(Duration::from_millis(2));
        }
        stamp(offset, buf)
    };
    run(steps(100), 4, &slow_first, &CANCEL, |piece| {
        match piece {
            Piece::Data { offset, data } => {
                assert_eq!(offset, next);
                assert!(data.iter().all(|b| *b == (offset / PIECE) as u8));
                next = offset + data.len() as u64;
            }
            Piece::Zero(range) => {
                assert_eq!(range.start, next);
                next = range.end;
            }
        }
        Ok(())
    })
    .unwrap();
    assert_eq!(next, 100 * PIECE);
}

#[test]
fn a_slow_consumer_bounds_what_is_read_ahead() {
    let read = AtomicU64::new(0);
    let count = |offset: u64, buf: &mut [u8]| {
        read.fetch_add(1, Ordering::Relaxed);
        stamp(offset, buf)
    };
    let mut taken = 0;
    run(steps(200), 4, &count, &CANCEL, |_| {
        taken += 1;
        if taken % 10 == 0 {
            std::thread::sleep(Duration::from_millis(3));
        }
        let ahead = read.load(Ordering::Relaxed).saturating_sub(taken);
        assert!(ahead <= AHEAD as u64 + 4, "{ahead} pieces ahead");
        Ok(())
    })
    .unwrap();
}

#[test]
fn kept_pieces_are_not_overwritten_by_buffer_reuse() {
    let kept = Mutex::new(Vec::new());
    run(steps(64), 3, &stamp, &CANCEL, |piece| {
        if let Piece::Data { offset, data } = piece
            && offset.is_multiple_of(2 * PIECE)
        {
            kept.lock().push((offset, data));
        }
        Ok(())
    })
    .unwrap();
    for (offset, data) in kept.into_inner() {
        assert!(data.iter().all(|b| *b == (offset / PIECE) as u8), "{offset}");
    }
}

#[test]
fn errors_of_plan_reader_and_consumer_end_the_run() {
    let fail = || ExportError::Invalid("planned".to_owned());
    let endless = || (0..).map(|i: u64| Ok(Step::Read(i * PIECE..(i + 1) * PIECE)));
    let bad_read = |offset: u64, buf: &mut [u8]| {
        if offset == 5 * PIECE { Err(fail()) } else { stamp(offset, buf) }
    };
    let mut seen = 0;
    let error = run(endless(), 4, &bad_read, &CANCEL, |_| {
        seen += 1;
        Ok(())
    });
    assert_eq!(error.unwrap_err().to_string(), "planned");
    assert_eq!(seen, 5, "what came before the damage was handed over, nothing after it");

    let error = run(endless(), 4, &stamp, &CANCEL, |_| Err(fail()));
    assert_eq!(error.unwrap_err().to_string(), "planned");

    let plan = steps(2).chain(std::iter::once(Err(fail())));
    assert_eq!(run(plan, 4, &stamp, &CANCEL, |_| Ok(())).unwrap_err().to_string(), "planned");
}

#[test]
fn cancellation_ends_a_run_that_has_no_end() {
    let cancel = AtomicBool::new(false);
    let mut seen = 0;
    let plan = (0..).map(|i: u64| Ok(Step::Read(i * PIECE..(i + 1) * PIECE)));
    let result = run(plan, 2, &stamp, &cancel, |_| {
        seen += 1;
        if seen == 20 {
            cancel.store(true, Ordering::Relaxed);
        }
        Ok(())
    });
    assert!(matches!(result, Err(ExportError::Cancelled)));
    assert_eq!(seen, 20);
}

#[test]
fn an_empty_plan_is_done_at_once() {
    run(steps(0), 2, &stamp, &CANCEL, |_| panic!("nothing was planned")).unwrap();
}
