//! Agents that hold still until a cut has been made, or will not be.

use std::{sync::Arc, time::Instant};

use super::agents::Hint;

/// Those of one volume. Bounded by the agents of a volume: one hint each.
#[derive(Debug, Default)]
pub(crate) struct Hints(Vec<Hint>);

impl Hints {
    /// An agent holds still for the next cut. Its last hint counts.
    pub(crate) fn add(&mut self, hint: Hint) {
        self.0.retain(|held| held.agent.is_attached());
        let of_same = |held: &mut Hint| Arc::ptr_eq(&held.agent, &hint.agent);
        for earlier in self.0.extract_if(.., of_same) {
            earlier.decline("a later hint took its place");
        }
        self.0.push(hint);
    }

    /// Those that still hold, for the search that begins; the others are told that they came too late.
    pub(crate) fn take(&mut self) -> Vec<Hint> {
        let now = Instant::now();
        let (live, late): (Vec<_>, Vec<_>) = self.0.drain(..).partition(|hint| hint.until > now);
        for hint in late {
            hint.decline("it came too late");
        }
        live
    }

    /// No cut comes for those who hold still.
    pub(crate) fn decline(&mut self, why: &'static str) {
        for hint in self.0.drain(..) {
            hint.decline(why);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use tidemark_block::VolumeId;

    use super::{
        super::agents::{Agent, Agents, Order},
        *,
    };

    const VOLUME: VolumeId = VolumeId::from_bytes([7; 16]);

    fn declined(order: Order) -> (u64, &'static str) {
        match order {
            Order::Done {
                hint,
                graded: Err(why),
                ..
            } => (hint, why),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_last_hint_of_an_agent_counts_and_one_whose_agent_is_gone_is_forgotten() {
        let agents = Agents::default();
        let attach = |name: &str| {
            let volumes = BTreeMap::from([(VOLUME, "data".to_owned())]);
            agents.attach(name.to_owned(), volumes).unwrap()
        };
        let (stays, mut orders) = attach("stays");
        let (goes, of_gone) = attach("goes");
        let until = Instant::now() + Duration::from_secs(60);
        let hint = |agent: &Arc<Agent>, hint| Hint {
            agent: Arc::clone(agent),
            hint,
            until,
        };
        let mut hints = Hints::default();
        hints.add(hint(&stays, 1));
        hints.add(hint(&goes, 2));
        drop(of_gone);
        hints.add(hint(&stays, 3));
        let later = "a later hint took its place";
        assert_eq!(declined(orders.try_recv().unwrap()), (1, later));
        let held: Vec<_> = hints.0.iter().map(|hint| hint.hint).collect();
        assert_eq!(held, [3]);
        hints.decline("no cut");
        assert_eq!(declined(orders.try_recv().unwrap()), (3, "no cut"));
    }

    #[test]
    fn a_hint_that_has_run_out_is_declined_when_a_search_begins() {
        let agents = Agents::default();
        let volumes = BTreeMap::from([(VOLUME, "data".to_owned())]);
        let (agent, mut orders) = agents.attach("db".to_owned(), volumes).unwrap();
        let mut hints = Hints::default();
        hints.add(Hint {
            agent,
            hint: 1,
            until: Instant::now(),
        });
        assert!(hints.take().is_empty());
        assert_eq!(
            declined(orders.try_recv().unwrap()),
            (1, "it came too late")
        );
    }
}
