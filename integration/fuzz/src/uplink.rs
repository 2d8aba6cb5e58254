//! The source's deciding machines on any order of events: the interval controller and the uplink.

use std::time::Duration;

use capture_core::{
    interval::{Backoff, Controller, Event as IntervalEvent, Ticket, Triggers},
    uplink::{Action, Event, Facts, Failure, OwnInterval, Uplink},
};
use tidemark_block::{GenerationId, Head, ImageDigest, IntervalId};

use crate::input::Input;

const EVENTS: usize = 200;
const BACKOFF: Backoff = Backoff {
    min: Duration::from_secs(1),
    max: Duration::from_secs(60),
};

/// Every ticket is answered at most once, none is lost, and a cut is never due while an interval is in flight.
fn controller(mut input: Input<'_>) {
    let triggers = Triggers {
        interval_max: Duration::from_secs(input.below(1000)),
        changed_blocks_max: input.flag().then(|| input.below(100)),
        backoff: BACKOFF,
    };
    let mut now = Duration::ZERO;
    let mut flying = input.flag();
    let mut machine = Controller::new(triggers, now, input.flag(), flying);
    let mut waiting: Vec<Ticket> = Vec::new();
    let mut next = 0;
    for _ in 0..EVENTS {
        if input.is_empty() {
            break;
        }
        now += Duration::from_millis(u64::from(input.u16()));
        let event = match input.u8() % 7 {
            0 => IntervalEvent::Changed(u64::from(input.u8())),
            1 => {
                next += 1;
                waiting.push(Ticket(next));
                IntervalEvent::Requested(Ticket(next))
            }
            2 => IntervalEvent::ResyncWanted,
            // The driver cuts when a cut is due.
            3 if machine.due(now).is_some() => {
                flying = true;
                IntervalEvent::Cut
            }
            4 if flying => {
                flying = false;
                IntervalEvent::Settled
            }
            5 => {
                flying = false;
                IntervalEvent::GivenUp {
                    jitter_permille: input.u16(),
                }
            }
            6 => {
                let mut failed = machine.drain();
                failed.sort_unstable();
                assert_eq!(failed, waiting, "everyone who waits is told");
                waiting.clear();
                continue;
            }
            _ => continue,
        };
        for ticket in machine.on(now, event).tickets {
            let at = waiting.iter().position(|waits| *waits == ticket);
            waiting.remove(at.expect("a ticket is answered once"));
        }
        assert_eq!(machine.in_flight(), flying);
        assert!(!flying || (machine.due(now).is_none() && machine.wake(now).is_none()));
        match machine.wake(now) {
            Some(wake) if !flying => assert!(
                machine.due(wake.max(now)).is_some(),
                "at the time it wakes for, a cut is due"
            ),
            Some(_) => panic!("it wakes while an interval is in flight"),
            None => assert!(flying),
        }
    }
    let mut failed = machine.drain();
    failed.sort_unstable();
    assert_eq!(failed, waiting);
}

fn interval_id(input: &mut Input<'_>) -> IntervalId {
    IntervalId::from_bytes([input.u8() % 3; 16])
}

fn head(input: &mut Input<'_>) -> Option<Head> {
    input.flag().then(|| Head {
        generation: GenerationId::new(input.below(4)),
        digest: ImageDigest::from_bytes([input.u8() % 3; 16]),
        interval: interval_id(input),
    })
}

fn own(input: &mut Input<'_>) -> OwnInterval {
    match input.u8() % 3 {
        0 => OwnInterval::None,
        1 => OwnInterval::Open(interval_id(input)),
        _ => OwnInterval::Lost(interval_id(input)),
    }
}

fn failed(input: &mut Input<'_>) -> Event {
    let failure = [
        Failure::Fenced,
        Failure::Transient,
        Failure::HeadMoved,
        Failure::Mismatch,
        Failure::Refused,
    ][usize::from(input.u8() % 5)];
    Event::Failed {
        failure,
        jitter_permille: input.u16(),
    }
}

/// What the action's end may be told as.
fn answer(action: Action, input: &mut Input<'_>) -> Option<Event> {
    if input.u8().is_multiple_of(4) {
        return Some(failed(input));
    }
    Some(match action {
        Action::StartTerm => Event::Granted { head: head(input) },
        Action::AdoptHead { .. } => Event::Adopted,
        Action::RepairTable => Event::TableRepaired,
        Action::DropInterval => Event::Dropped,
        Action::AwaitCut => Event::CutMade(interval_id(input)),
        Action::Ship(_) if input.flag() => Event::Progressed,
        Action::Ship(_) => Event::Settled {
            base: GenerationId::new(input.below(4)),
            digest: ImageDigest::from_bytes([input.u8() % 3; 16]),
        },
        Action::Wait { .. } => Event::Poked,
        Action::Halt => return None,
    })
}

/// Whatever the vault answers: nothing ships before a term is granted and the table is sound, what is lost is never
/// resumed, and once fenced nothing is asked of the vault.
fn uplink(mut input: Input<'_>) {
    let facts = Facts {
        base: GenerationId::new(input.below(4)),
        base_digest: input
            .flag()
            .then(|| ImageDigest::from_bytes([input.u8() % 3; 16])),
        own: own(&mut input),
        table_sound: input.flag(),
    };
    let mut now = Duration::ZERO;
    let mut machine = Uplink::new(facts, BACKOFF);
    let (mut granted, mut fenced) = (false, false);
    for _ in 0..EVENTS {
        if input.is_empty() {
            break;
        }
        let action = machine.next(now);
        if fenced {
            assert_eq!(
                action,
                Action::Halt,
                "once fenced nothing is asked of the vault"
            );
        }
        match action {
            Action::Ship(id) => {
                assert!(granted && machine.facts().table_sound);
                assert_eq!(machine.facts().own, OwnInterval::Open(id));
            }
            Action::RepairTable | Action::AdoptHead { .. } => assert!(granted),
            Action::AwaitCut => {
                assert!(granted && machine.facts().table_sound);
                assert_eq!(machine.facts().own, OwnInterval::None);
            }
            Action::Wait { until } => {
                assert!(until > now && until <= now + BACKOFF.max);
                now += Duration::from_millis(u64::from(input.u16()));
            }
            Action::StartTerm | Action::DropInterval | Action::Halt => {}
        }
        let event = match input.u8() % 8 {
            0 => Event::GivenUp,
            1 => Event::TableLost,
            2 => Event::Poked,
            _ => match answer(action, &mut input) {
                Some(event) => event,
                None => return,
            },
        };
        match event {
            Event::Granted { .. } => granted = true,
            Event::Failed { failure, .. } => {
                granted = false;
                fenced |= failure == Failure::Fenced;
            }
            _ => {}
        }
        machine.on(now, event);
    }
}

/// Machines.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    if input.flag() {
        controller(input);
    } else {
        uplink(input);
    }
}
