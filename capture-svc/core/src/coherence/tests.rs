use proptest::prelude::*;

use super::*;

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

const LIMITS: Limits = Limits {
    lull_wait_max: ms(2000),
    lull_min: ms(50),
    on_failure: OnFailure::Cut,
};

fn party(name: &str) -> Party {
    Party {
        name: name.to_owned(),
        time: ms(5000),
        holds: false,
    }
}

/// `begun` writes, the last of which ended then.
const fn written(begun: u64, last: u64, flushed: bool) -> Seen {
    Seen {
        begun,
        in_flight: false,
        flushed,
        last_write: Some(ms(last)),
        unseen: false,
    }
}

const fn writing(begun: u64) -> Seen {
    Seen {
        begun,
        in_flight: true,
        flushed: false,
        last_write: Some(ms(0)),
        unseen: false,
    }
}

fn graded(effects: &[Effect]) -> (Coherence, String) {
    let found = effects.iter().find_map(|effect| match effect {
        Effect::Graded(graded) => Some((graded.coherence, graded.reason().to_string())),
        _ => None,
    });
    found.expect("a grade")
}

#[test]
fn without_anyone_who_quiesces_the_first_look_already_decides() {
    let cases = [
        // Seen at 1000; whether a cut is made at once; when it is looked at again.
        (
            Seen {
                flushed: true,
                ..Seen::default()
            },
            true,
            None,
        ),
        (written(3, 950, true), true, None),
        (written(3, 951, true), false, Some(1050 - 49)),
        (written(3, 950, false), false, Some(1050)),
        (written(3, 800, false), true, None),
        (written(3, 801, false), false, Some(1050)),
        (writing(3), false, Some(1050)),
    ];
    for (seen, cut, wake) in cases {
        let (search, effects) = Search::begin(ms(1000), seen, LIMITS, Vec::new());
        assert_eq!(effects == [Effect::Cut], cut, "{seen:?}");
        assert_eq!(search.wake(), wake.map(ms), "{seen:?}");
    }
}

#[test]
fn a_search_for_several_volumes_skips_where_one_of_them_would() {
    let skipping = Limits {
        on_failure: OnFailure::Skip,
        ..LIMITS
    };
    for (all, expected) in [
        (&[][..], None),
        (&[LIMITS, LIMITS], Some(LIMITS)),
        (&[LIMITS, skipping, LIMITS], Some(skipping)),
    ] {
        assert_eq!(Limits::together(all.iter().copied()), expected);
    }
}

#[test]
fn a_cut_that_is_wanted_at_once_is_made_at_the_first_look_and_graded_all_the_same() {
    const AT_ONCE: &str = "it was to be made at once";
    let cases = [
        (written(3, 100, true), Coherence::Flushed, ""),
        (
            written(3, 100, false),
            Coherence::Lull,
            "; the last write was not flushed",
        ),
        (
            writing(3),
            Coherence::Crash,
            "; the last write was less than 50ms ago",
        ),
        (
            Seen::NOTHING,
            Coherence::Crash,
            "; the engine does not see writes",
        ),
    ];
    for (seen, coherence, why) in cases {
        let (mut search, effects) = Search::at_once(ms(1000), seen, LIMITS);
        assert_eq!(effects, [Effect::Cut], "{seen:?}");
        let effects = search.on(ms(1001), seen, Event::CutMade);
        assert_eq!(graded(&effects), (coherence, format!("{AT_ONCE}{why}")));
        assert!(search.is_over());
    }
}

#[test]
fn a_grade_is_what_was_seen_at_the_flip_with_the_reason_why_it_is_no_better() {
    const NOBODY: &str = "no agent or command quiesces the workload";
    let cases = [
        (
            written(3, 100, true),
            written(3, 100, true),
            Coherence::Flushed,
            "",
        ),
        (
            written(3, 100, true),
            written(4, 1000, false),
            Coherence::Crash,
            "; a write began just before the cut",
        ),
        (
            written(3, 100, false),
            written(3, 100, false),
            Coherence::Lull,
            "; the last write was not flushed",
        ),
        (
            written(3, 100, false),
            writing(4),
            Coherence::Crash,
            "; a write began just before the cut",
        ),
        // A flush that came just before the cut counts.
        (
            written(3, 100, false),
            written(3, 100, true),
            Coherence::Flushed,
            "",
        ),
    ];
    for (look, flip, coherence, reason) in cases {
        let (mut search, effects) = Search::begin(ms(1000), look, LIMITS, Vec::new());
        assert_eq!(effects, [Effect::Cut], "{look:?}");
        let effects = search.on(ms(1001), flip, Event::CutMade);
        assert_eq!(graded(&effects), (coherence, format!("{NOBODY}{reason}")));
        assert!(search.is_over());
    }
}

#[test]
fn a_workload_that_never_pauses_is_cut_at_the_end_of_the_wait() {
    let (mut search, effects) = Search::begin(ms(0), writing(1), LIMITS, Vec::new());
    assert_eq!(effects, []);
    let mut n = 1;
    loop {
        let wake = search.wake().unwrap();
        n += 1;
        let effects = search.on(wake, writing(n), Event::Look);
        if effects == [Effect::Cut] {
            assert_eq!(wake, ms(2000));
            break;
        }
    }
    let effects = search.on(ms(2001), writing(n), Event::CutMade);
    let (coherence, reason) = graded(&effects);
    assert_eq!(coherence, Coherence::Crash);
    assert!(
        reason.ends_with("; writes without a pause of 50ms for 2s"),
        "{reason}"
    );
}

#[test]
fn no_wait_at_all_still_tells_what_was_there() {
    let limits = Limits {
        lull_wait_max: ms(0),
        ..LIMITS
    };
    for (seen, coherence, reason) in [
        (
            writing(1),
            Coherence::Crash,
            "; the last write was less than 50ms ago",
        ),
        (written(1, 990, true), Coherence::Flushed, ""),
        (
            written(1, 900, false),
            Coherence::Lull,
            "; the last write was not flushed",
        ),
    ] {
        let (mut search, effects) = Search::begin(ms(1000), seen, limits, Vec::new());
        assert_eq!(effects, [Effect::Cut]);
        let (found, text) = graded(&search.on(ms(1000), seen, Event::CutMade));
        assert_eq!(found, coherence);
        assert!(text.ends_with(reason), "{text}");
    }
}

#[test]
fn where_writes_are_not_seen_a_cut_is_made_at_once_and_only_whoever_holds_still_makes_it_better() {
    let unseen = Seen::NOTHING;
    let (mut search, effects) = Search::begin(ms(1000), unseen, LIMITS, Vec::new());
    assert_eq!(effects, [Effect::Cut]);
    let effects = search.on(ms(1001), unseen, Event::CutMade);
    let nobody = "no agent or command quiesces the workload; the engine does not see writes";
    assert_eq!(graded(&effects), (Coherence::Crash, nobody.to_owned()));

    let parties = vec![party("agent db")];
    let (mut search, _) = Search::begin(ms(1000), unseen, LIMITS, parties.clone());
    assert_eq!(search.on(ms(1100), unseen, Event::Frozen(0)), [Effect::Cut]);
    let effects = search.on(ms(1200), unseen, Event::CutMade);
    assert_eq!(graded(&effects), (Coherence::Quiesced, String::new()));

    let (mut search, _) = Search::begin(ms(1000), unseen, LIMITS, parties);
    let frozen = search.on(ms(1100), unseen, Event::Frozen(0));
    assert_eq!(frozen, [Effect::Cut]);
    let gone = Event::Failed(0, Failure::Gone);
    assert_eq!(search.on(ms(1150), unseen, gone), []);
    let effects = search.on(ms(1200), unseen, Event::CutMade);
    let gone = "agent db went away; the engine does not see writes";
    assert_eq!(graded(&effects), (Coherence::Crash, gone.to_owned()));
}

#[test]
fn parties_freeze_in_order_and_thaw_in_reverse_and_the_cut_lies_between() {
    let parties = vec![party("agent db"), party("quiesce_pre")];
    let seen = written(7, 999, false);
    let (mut search, effects) = Search::begin(ms(1000), seen, LIMITS, parties);
    assert_eq!(effects, [Effect::Freeze(0)]);
    assert_eq!(search.wake(), Some(ms(6000)));
    assert_eq!(
        search.on(ms(1500), seen, Event::Frozen(0)),
        [Effect::Freeze(1)]
    );
    assert_eq!(
        search.on(ms(1500), seen, Event::Frozen(0)),
        [],
        "said twice"
    );
    assert_eq!(search.wake(), Some(ms(6500)));
    // A write is still under way: it is waited for.
    assert_eq!(search.on(ms(1600), writing(8), Event::Frozen(1)), []);
    assert_eq!(search.wake(), Some(ms(1601)));
    let seen = written(8, 1601, false);
    assert_eq!(search.on(ms(1601), seen, Event::Look), [Effect::Cut]);
    let effects = search.on(ms(1602), seen, Event::CutMade);
    assert_eq!(effects[..2], [Effect::Thaw(1), Effect::Thaw(0)]);
    assert_eq!(graded(&effects), (Coherence::Quiesced, String::new()));
    assert_eq!(search.on(ms(1700), seen, Event::Abandoned), []);
}

#[test]
fn a_party_that_does_not_hold_still_costs_the_grade_and_never_leaves_anyone_frozen() {
    let refused = Failure::Refused("in a transaction".to_owned());
    let cases = [
        (
            Event::Failed(1, refused),
            "agent log refused to freeze: in a transaction",
        ),
        (Event::Failed(1, Failure::Gone), "agent log went away"),
        (Event::Failed(0, Failure::Gone), "agent db went away"),
        (
            Event::Failed(1, Failure::Failed("exit status 3".to_owned())),
            "agent log failed: exit status 3",
        ),
        (Event::Look, "agent log did not answer within 5s"),
    ];
    let seen = written(7, 10, true);
    for (event, reason) in cases {
        let parties = vec![party("agent db"), party("agent log"), party("quiesce_pre")];
        let (mut search, _) = Search::begin(ms(1000), seen, LIMITS, parties);
        assert_eq!(
            search.on(ms(2000), seen, Event::Frozen(0)),
            [Effect::Freeze(1)]
        );
        let effects = search.on(ms(7000), seen, event);
        assert_eq!(effects, [Effect::Thaw(1), Effect::Thaw(0), Effect::Cut]);
        let effects = search.on(ms(7001), seen, Event::CutMade);
        assert_eq!(graded(&effects), (Coherence::Flushed, reason.to_owned()));
    }
}

#[test]
fn by_policy_there_is_no_cut_where_the_workload_can_not_be_quiesced() {
    let limits = Limits {
        on_failure: OnFailure::Skip,
        ..LIMITS
    };
    let seen = Seen::default();
    let (mut search, _) = Search::begin(ms(0), seen, limits, vec![party("agent db")]);
    let effects = search.on(ms(5000), seen, Event::Look);
    let why = Why::Party {
        name: "agent db".to_owned(),
        failure: Failure::Late(ms(5000)),
    };
    assert_eq!(effects, [Effect::Thaw(0), Effect::Skip(why)]);
    assert!(search.is_over());
}

#[test]
fn writes_after_the_freeze_and_parties_lost_at_the_cut_are_told() {
    for (flip, event, reason) in [
        (
            written(8, 1000, false),
            None,
            "writes went on while all were frozen",
        ),
        (
            written(7, 10, false),
            Some(Event::Failed(0, Failure::Gone)),
            "agent db went away",
        ),
    ] {
        let seen = written(7, 10, false);
        let (mut search, _) = Search::begin(ms(1000), seen, LIMITS, vec![party("agent db")]);
        assert_eq!(search.on(ms(1001), seen, Event::Frozen(0)), [Effect::Cut]);
        if let Some(event) = event {
            assert_eq!(search.on(ms(1001), seen, event), []);
        }
        let effects = search.on(ms(1002), flip, Event::CutMade);
        assert_eq!(effects[0], Effect::Thaw(0));
        let (coherence, text) = graded(&effects);
        assert!(coherence < Coherence::Quiesced);
        assert!(text.starts_with(reason), "{text}");
    }
}

#[test]
fn an_agent_that_holds_still_of_its_own_accord_is_only_told_to_thaw() {
    let holding = Party {
        holds: true,
        ..party("agent db")
    };
    let seen = written(7, 999, false);
    let (mut search, effects) = Search::begin(ms(1000), seen, LIMITS, vec![holding]);
    assert_eq!(effects, [Effect::Cut]);
    let effects = search.on(ms(1001), seen, Event::CutMade);
    assert_eq!(effects[0], Effect::Thaw(0));
    assert_eq!(graded(&effects).0, Coherence::Quiesced);
}

#[test]
fn an_agent_that_holds_still_and_is_lost_before_its_turn_counts_as_lost_and_all_are_thawed() {
    let holding = Party {
        holds: true,
        ..party("agent log")
    };
    let parties = vec![party("agent db"), party("agent web"), holding];
    let seen = written(7, 10, true);
    for (event, why) in [
        (Event::Failed(2, Failure::Gone), "agent log went away"),
        (Event::Failed(0, Failure::Gone), "agent db went away"),
    ] {
        let (mut search, effects) = Search::begin(ms(1000), seen, LIMITS, parties.clone());
        assert_eq!(effects, [Effect::Freeze(0)]);
        assert_eq!(
            search.on(ms(1001), seen, Event::Failed(1, Failure::Gone)),
            [],
            "not asked yet"
        );
        let effects = search.on(ms(1001), seen, event);
        assert_eq!(effects, [Effect::Thaw(2), Effect::Thaw(0), Effect::Cut]);
        let effects = search.on(ms(1002), seen, Event::CutMade);
        assert_eq!(graded(&effects), (Coherence::Flushed, why.to_owned()));
    }
}

/// What really happens, as a naive model of it.
#[derive(Debug, Default)]
struct World {
    now: u64,
    seen: Seen,
    /// Asked, in order; with whether it has said that it holds still.
    asked: Vec<(usize, bool)>,
    /// Told to thaw, in order.
    thawed: Vec<usize>,
    cuts: u32,
    /// Somebody failed, or was late.
    failed: bool,
    /// A write began since the last freeze was answered, or was under way then.
    disturbed: bool,
    frozen_all: bool,
}

impl World {
    fn perform(&mut self, effects: &[Effect], parties: &[Party]) -> Result<(), TestCaseError> {
        for effect in effects {
            match effect {
                Effect::Freeze(n) => {
                    let from = self.asked.last().map_or(0, |(last, _)| last + 1);
                    prop_assert!(
                        parties[from..*n].iter().all(|party| party.holds),
                        "one was passed over"
                    );
                    prop_assert!(self.asked.iter().all(|(_, frozen)| *frozen));
                    prop_assert!(self.thawed.is_empty());
                    self.asked.push((*n, false));
                }
                Effect::Thaw(n) => {
                    let was_asked = self.asked.iter().any(|(asked, _)| asked == n);
                    prop_assert!(was_asked || parties[*n].holds);
                    prop_assert!(
                        self.thawed.last().is_none_or(|last| n < last),
                        "in reverse order, once"
                    );
                    self.thawed.push(*n);
                }
                Effect::Cut => self.cuts += 1,
                Effect::Graded(_) | Effect::Skip(_) => {}
            }
        }
        prop_assert!(self.cuts <= 1, "two cuts for one want");
        Ok(())
    }

    fn left_frozen(&self, parties: &[Party]) -> bool {
        let frozen = |n: usize| parties[n].holds || self.asked.iter().any(|(asked, _)| *asked == n);
        (0..parties.len()).any(|n| frozen(n) && !self.thawed.contains(&n))
    }

    fn write(&mut self, begins: bool) {
        if begins {
            self.seen.begun += 1;
            self.seen.in_flight = true;
            self.seen.flushed = false;
            self.disturbed = true;
        } else if self.seen.in_flight {
            self.seen.in_flight = false;
            self.seen.last_write = Some(ms(self.now));
        }
    }
}

proptest! {
    #[test]
    fn whatever_happens_one_cut_at_most_all_thawed_in_time_and_no_grade_is_flattered(
        holds in prop::collection::vec(any::<bool>(), 0..4),
        skip in any::<bool>(),
        steps in prop::collection::vec((0..9u8, 0..60u64), 1..300),
    ) {
        let on_failure = if skip { OnFailure::Skip } else { OnFailure::Cut };
        let limits = Limits { lull_wait_max: ms(300), lull_min: ms(50), on_failure };
        let parties: Vec<_> = holds.iter().map(|&holds| Party {
            name: "p".to_owned(), time: ms(200), holds,
        }).collect();
        let mut world = World { now: 1000, seen: Seen { flushed: true, ..Seen::default() }, ..World::default() };
        let mut longest = 300;
        longest += 200 * u64::try_from(holds.iter().filter(|holds| !**holds).count()).unwrap();
        let (mut search, effects) = Search::begin(ms(1000), world.seen, limits, parties.clone());
        world.disturbed = false;
        world.frozen_all = holds.iter().all(|holds| *holds) && !holds.is_empty();
        world.perform(&effects, &parties)?;
        let mut over = false;
        for (step, n) in steps {
            // Time never passes beyond what the search wants to look at.
            let then = world.now + n;
            world.now = search.wake().map_or(then, |wake| then.min(u64::try_from(wake.as_millis()).unwrap()));
            let now = ms(world.now);
            let current = world.asked.last().copied().filter(|_| world.thawed.is_empty());
            let event = match (step, current) {
                (0 | 1, _) => { world.write(step == 0); continue; }
                (2, _) => { world.seen.flushed |= !world.seen.in_flight; continue; }
                (3 | 4, Some((index, false))) => {
                    let late = search.wake().is_some_and(|wake| wake <= now);
                    if late {
                        world.failed = true;
                    } else {
                        world.asked.last_mut().unwrap().1 = true;
                        if holds[index + 1..].iter().all(|holds| *holds) {
                            world.frozen_all = true;
                            world.disturbed = world.seen.in_flight && world.disturbed;
                        }
                    }
                    Event::Frozen(index)
                }
                (5, Some((index, _))) if n < 10 => { world.failed = true; Event::Failed(index, Failure::Gone) }
                (8, _) if n < 5 && holds.last() == Some(&true) && world.thawed.is_empty() => {
                    world.failed = true;
                    Event::Failed(holds.len() - 1, Failure::Gone)
                }
                (6, _) if world.cuts == 1 => Event::CutMade,
                (7, _) if n == 0 => Event::Abandoned,
                _ => Event::Look,
            };
            if world.cuts == 0 {
                prop_assert!(world.now <= 1000 + longest, "it took too long");
            }
            if let (Event::Look, Some((_, false))) = (&event, current) {
                world.failed |= search.wake().is_some_and(|wake| wake <= now);
            }
            if world.frozen_all && !world.seen.in_flight && world.cuts == 0 {
                // Writes that were under way when all had frozen are waited for.
                world.disturbed = false;
            }
            let effects = search.on(now, world.seen, event.clone());
            world.perform(&effects, &parties)?;
            for effect in &effects {
                let Effect::Graded(graded) = effect else { continue };
                prop_assert_eq!(event.clone(), Event::CutMade);
                let quiet = world.seen.last_write.is_none_or(|last| now - last >= ms(50));
                let most = if world.frozen_all && !world.failed && !world.disturbed {
                    Coherence::Quiesced
                } else if world.seen.flushed {
                    Coherence::Flushed
                } else if quiet && !world.seen.in_flight {
                    Coherence::Lull
                } else {
                    Coherence::Crash
                };
                prop_assert!(graded.coherence <= most, "{:?} > {most:?}", graded);
                prop_assert_eq!(graded.why.is_empty(), graded.coherence == Coherence::Quiesced);
            }
            over = search.is_over();
            if over {
                prop_assert!(!world.left_frozen(&parties), "left frozen: {:?}", world);
                prop_assert_eq!(search.on(now, world.seen, Event::CutMade), Vec::new());
                break;
            }
        }
        if !over {
            let effects = search.on(ms(world.now), world.seen, Event::Abandoned);
            world.perform(&effects, &parties)?;
            prop_assert!(!world.left_frozen(&parties), "left frozen: {:?}", world);
        }
    }
}
