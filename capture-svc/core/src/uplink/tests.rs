use proptest::prelude::*;

use super::*;

const BACKOFF: Backoff = Backoff {
    min: Duration::from_secs(1),
    max: Duration::from_secs(60),
};
const NOW: Duration = Duration::from_secs(1000);

const fn id(n: u8) -> IntervalId {
    IntervalId::from_bytes([n; 16])
}

const fn digest(n: u8) -> ImageDigest {
    ImageDigest::from_bytes([n; 16])
}

fn head(generation: u64, n: u8) -> Option<Head> {
    Some(Head {
        generation: GenerationId::new(generation),
        digest: digest(n),
        interval: id(n),
    })
}

fn facts(base: u64, own: OwnInterval) -> Facts {
    Facts {
        base: GenerationId::new(base),
        base_digest: (base > 0).then(|| digest(u8::try_from(base).unwrap())),
        own,
        table_sound: true,
    }
}

const fn failed(failure: Failure) -> Event {
    Event::Failed {
        failure,
        jitter_permille: 1000,
    }
}

fn after(facts: Facts, events: &[Event]) -> Uplink {
    let mut uplink = Uplink::new(facts, BACKOFF);
    for &event in events {
        uplink.on(NOW, event);
    }
    uplink
}

#[test]
fn the_head_that_the_vault_names_decides_how_a_session_begins() {
    let adopt = |head, doubt| Action::AdoptHead { head, doubt };
    let cases = [
        (facts(0, OwnInterval::None), None, Action::AwaitCut),
        (
            facts(0, OwnInterval::Open(id(9))),
            None,
            Action::Ship(id(9)),
        ),
        (facts(3, OwnInterval::None), head(3, 3), Action::AwaitCut),
        (
            facts(3, OwnInterval::Open(id(9))),
            head(3, 3),
            Action::Ship(id(9)),
        ),
        // The receipt was lost: the header brings it again.
        (
            facts(3, OwnInterval::Open(id(9))),
            head(4, 9),
            Action::Ship(id(9)),
        ),
        (
            facts(3, OwnInterval::Lost(id(9))),
            head(4, 9),
            adopt(head(4, 9), false),
        ),
        (
            facts(3, OwnInterval::Lost(id(9))),
            head(3, 3),
            Action::DropInterval,
        ),
        // The vault lost generations, or somebody else made some.
        (
            facts(3, OwnInterval::None),
            head(2, 2),
            adopt(head(2, 2), true),
        ),
        (facts(3, OwnInterval::None), None, adopt(None, true)),
        (
            facts(3, OwnInterval::Open(id(9))),
            head(4, 8),
            adopt(head(4, 8), true),
        ),
        // The same number, another image.
        (
            facts(3, OwnInterval::None),
            head(3, 7),
            adopt(head(3, 7), true),
        ),
        (
            facts(0, OwnInterval::None),
            head(1, 7),
            adopt(head(1, 7), true),
        ),
    ];
    for (facts, head, expected) in cases {
        let mut uplink = Uplink::new(facts, BACKOFF);
        assert_eq!(uplink.next(NOW), Action::StartTerm);
        uplink.on(NOW, Event::Granted { head });
        assert_eq!(uplink.next(NOW), expected, "{facts:?} {head:?}");
    }
}

#[test]
fn a_lost_receipt_and_a_lost_table_end_in_the_table_of_the_head() {
    let lost_table = Facts {
        table_sound: false,
        ..facts(3, OwnInterval::Open(id(9)))
    };
    let mut uplink = after(lost_table, &[Event::Granted { head: head(4, 9) }]);
    assert_eq!(
        uplink.next(NOW),
        Action::AdoptHead {
            head: head(4, 9),
            doubt: false
        },
        "the vault has no digests of generation 3 to give"
    );
    uplink.on(NOW, Event::Adopted);
    assert_eq!(uplink.facts().base, GenerationId::new(4));
    assert_eq!(uplink.facts().own, OwnInterval::None);
    assert_eq!(uplink.next(NOW), Action::RepairTable);
    uplink.on(NOW, Event::TableRepaired);
    assert_eq!(uplink.next(NOW), Action::AwaitCut);

    // While the head is the base still, the table is fetched first and the interval goes on.
    let mut uplink = after(lost_table, &[Event::Granted { head: head(3, 3) }]);
    assert_eq!(uplink.next(NOW), Action::RepairTable);
    uplink.on(NOW, Event::TableRepaired);
    assert_eq!(uplink.next(NOW), Action::Ship(id(9)));
}

#[test]
fn each_failure_has_its_way_on() {
    let wait = Action::Wait {
        until: NOW + Duration::from_secs(1),
    };
    let cases = [
        (Failure::Fenced, Action::Halt, Action::Halt),
        (Failure::Transient, wait, Action::StartTerm),
        (Failure::HeadMoved, wait, Action::StartTerm),
        (Failure::Mismatch, Action::DropInterval, Action::StartTerm),
        (Failure::Refused, Action::DropInterval, Action::StartTerm),
    ];
    for (failure, at_once, later) in cases {
        let mut uplink = after(
            facts(3, OwnInterval::Open(id(9))),
            &[Event::Granted { head: head(3, 3) }, failed(failure)],
        );
        assert_eq!(uplink.next(NOW), at_once, "{failure:?}");
        if at_once == Action::DropInterval {
            uplink.on(NOW, Event::Dropped);
            assert_eq!(uplink.next(NOW), wait, "{failure:?}");
        }
        assert_eq!(
            uplink.next(NOW + Duration::from_secs(1)),
            later,
            "{failure:?}"
        );
    }
}

#[test]
fn after_a_mismatch_the_table_is_repaired_before_the_next_cut() {
    let mut uplink = after(
        facts(3, OwnInterval::Open(id(9))),
        &[
            Event::Granted { head: head(3, 3) },
            failed(Failure::Mismatch),
            Event::Dropped,
            Event::Poked,
            Event::Granted { head: head(3, 3) },
        ],
    );
    assert_eq!(uplink.next(NOW), Action::RepairTable);
    uplink.on(NOW, Event::TableRepaired);
    assert_eq!(uplink.next(NOW), Action::AwaitCut);
}

#[test]
fn an_adopted_head_is_the_base_and_its_table_is_fetched() {
    let mut uplink = after(
        facts(3, OwnInterval::Open(id(9))),
        &[Event::Granted { head: head(5, 8) }, Event::Adopted],
    );
    assert_eq!(uplink.facts().base, GenerationId::new(5));
    assert_eq!(uplink.facts().own, OwnInterval::None);
    assert_eq!(uplink.next(NOW), Action::RepairTable);
    uplink.on(NOW, Event::TableRepaired);
    assert_eq!(uplink.next(NOW), Action::AwaitCut);
}

#[test]
fn waits_grow_until_something_gets_through() {
    let mut uplink = after(
        facts(3, OwnInterval::Open(id(9))),
        &[
            failed(Failure::Transient),
            failed(Failure::Transient),
            failed(Failure::Transient),
        ],
    );
    assert_eq!(
        uplink.next(NOW),
        Action::Wait {
            until: NOW + Duration::from_secs(4)
        }
    );
    uplink.on(NOW, Event::Poked);
    assert_eq!(
        uplink.next(NOW),
        Action::StartTerm,
        "a request doesn't wait"
    );
    uplink.on(NOW, Event::Granted { head: head(3, 3) });
    uplink.on(NOW, Event::Progressed);
    uplink.on(NOW, failed(Failure::Transient));
    assert_eq!(
        uplink.next(NOW),
        Action::Wait {
            until: NOW + Duration::from_secs(1)
        }
    );
}

#[test]
fn a_settled_interval_is_the_base_of_the_next_one() {
    let mut uplink = after(
        facts(3, OwnInterval::None),
        &[
            Event::Granted { head: head(3, 3) },
            Event::CutMade(id(9)),
            Event::Settled {
                base: GenerationId::new(4),
                digest: digest(9),
            },
        ],
    );
    assert_eq!(uplink.next(NOW), Action::AwaitCut);
    uplink.on(NOW, failed(Failure::Transient));
    uplink.on(NOW, Event::Poked);
    uplink.on(NOW, Event::Granted { head: head(4, 9) });
    assert_eq!(uplink.next(NOW), Action::AwaitCut);
}

fn any_head() -> impl Strategy<Value = Option<Head>> {
    prop_oneof![Just(None), (1..4u64, 1..5u8).prop_map(|(g, n)| head(g, n))]
}

fn any_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        any_head().prop_map(|head| Event::Granted { head }),
        prop_oneof![
            Just(Failure::Transient),
            Just(Failure::HeadMoved),
            Just(Failure::Mismatch),
            Just(Failure::Refused),
            Just(Failure::Fenced),
        ]
        .prop_map(failed),
        Just(Event::Progressed),
        Just(Event::GivenUp),
        Just(Event::Poked),
    ]
}

proptest! {
    /// The vault of this model answers whatever it likes; the driver does what it is told.
    #[test]
    fn nothing_ships_on_a_foreign_base_or_an_unsound_table(
        base in 0..4u64,
        own in 0..3u8,
        table_sound in any::<bool>(),
        events in prop::collection::vec((any_event(), any::<bool>()), 1..60),
    ) {
        let own = match own {
            0 => OwnInterval::None,
            1 => OwnInterval::Open(id(9)),
            _ => OwnInterval::Lost(id(9)),
        };
        let mut uplink = Uplink::new(Facts { table_sound, ..facts(base, own) }, BACKOFF);
        let mut now = NOW;
        let mut granted: Option<Option<Head>> = None;
        let mut fenced = false;
        for (event, succeed) in events {
            let action = uplink.next(now);
            if fenced {
                prop_assert_eq!(action, Action::Halt);
                break;
            }
            let facts = *uplink.facts();
            match action {
                Action::Ship(interval) => {
                    prop_assert_eq!(facts.own, OwnInterval::Open(interval));
                    prop_assert!(facts.table_sound);
                    let head = granted.unwrap();
                    let ours = head.map_or(GenerationId::ZERO, |h| h.generation) == facts.base
                        || head.map(|h| h.interval) == Some(interval);
                    prop_assert!(ours);
                }
                Action::RepairTable => {
                    // The vault tells the digests of its head only.
                    prop_assert_eq!(granted.unwrap().map_or(GenerationId::ZERO, |h| h.generation), facts.base);
                }
                Action::AwaitCut => {
                    prop_assert!(facts.table_sound && facts.own == OwnInterval::None);
                    prop_assert_eq!(granted.unwrap().map_or(GenerationId::ZERO, |h| h.generation), facts.base);
                }
                Action::Wait { until } => {
                    prop_assert!(until > now && until <= now + BACKOFF.max);
                    now = until;
                    continue;
                }
                _ => {}
            }
            let event = match (action, event) {
                (Action::StartTerm, Event::Granted { .. } | Event::Failed { .. }) => event,
                (Action::StartTerm, _) => continue,
                (_, Event::Failed { .. }) => event,
                (Action::Ship(_), Event::GivenUp | Event::Progressed) => event,
                (Action::Ship(_), _) if succeed => {
                    let base = granted.unwrap().map_or(1, |h| h.generation.get() + 1);
                    granted = Some(head(base, 9));
                    Event::Settled { base: GenerationId::new(base), digest: digest(9) }
                }
                (Action::AwaitCut, _) if succeed => Event::CutMade(id(9)),
                (Action::AdoptHead { .. }, _) => Event::Adopted,
                (Action::RepairTable, _) => Event::TableRepaired,
                (Action::DropInterval, _) => Event::Dropped,
                _ => Event::Poked,
            };
            match event {
                Event::Granted { head } => granted = Some(head),
                Event::Failed { failure, .. } => {
                    granted = None;
                    fenced = failure == Failure::Fenced;
                }
                _ => {}
            }
            uplink.on(now, event);
        }
    }
}
