//! `tidemark generation common`: moments of which several volumes have an image.
//!
//! The volumes of a group are cut at one instant, and their cuts have one time. A volume that had not changed has no
//! generation of that time: its newest one before is marked as current through it.

use std::collections::BTreeMap;

use serde::Serialize;

use super::retained;
use crate::{
    args::Global,
    failure::Failure,
    format, output,
    report::{Generation, Moment},
};

/// A moment.
#[derive(Debug, Serialize)]
struct Common {
    cut_time: Moment,
    /// By volume.
    generations: BTreeMap<String, u64>,
}

pub(super) async fn run(global: &Global, volumes: Vec<String>) -> Result<(), Failure> {
    let mut of_volumes = Vec::with_capacity(volumes.len());
    for volume in volumes {
        let generations = retained(global, volume.clone()).await?;
        let spans = generations.iter().filter_map(Span::of).collect();
        of_volumes.push((volume, spans));
    }
    let found = common(&of_volumes);
    let text = if found.is_empty() {
        let names: Vec<_> = of_volumes.iter().map(|(volume, _)| &**volume).collect();
        format!(
            "no moment of which each of {} has an image; volumes of one group have\n",
            names.join(", ")
        )
    } else {
        table(&found)
    };
    output::print(global.json, &found, &text)
}

fn table(found: &[Common]) -> String {
    let rows: Vec<_> = found
        .iter()
        .map(|common| {
            let named = common.generations.iter();
            let named: Vec<_> = named.map(|(volume, n)| format!("{volume}@{n}")).collect();
            [format::time(Some(common.cut_time)), named.join("  ")]
        })
        .collect();
    format::table(["MOMENT", "GENERATIONS"], &rows)
}

/// A generation, and for how long the volume was what it shows.
#[derive(Debug, Clone, Copy)]
struct Span {
    generation: u64,
    from: Moment,
    through: Moment,
}

impl Span {
    fn of(generation: &Generation) -> Option<Self> {
        let from = generation.cut_time?;
        Some(Self {
            generation: generation.generation,
            from,
            through: generation.current_through.unwrap_or(from).max(from),
        })
    }
}

/// The cuts at whose time every volume was what one of its generations shows, newest first.
fn common(of_volumes: &[(String, Vec<Span>)]) -> Vec<Common> {
    let cuts = of_volumes.iter().flat_map(|(_, spans)| spans);
    let mut cuts: Vec<_> = cuts.map(|span| span.from).collect();
    cuts.sort_unstable();
    cuts.dedup();
    let at = |cut_time: Moment| {
        let generations = of_volumes.iter().map(|(volume, spans)| {
            // The newest begins last: two may touch.
            let mut shown = spans.iter().rev();
            let shown = shown.find(|span| (span.from..=span.through).contains(&cut_time))?;
            Some((volume.clone(), shown.generation))
        });
        Some(Common {
            cut_time,
            generations: generations.collect::<Option<_>>()?,
        })
    };
    cuts.into_iter().rev().filter_map(at).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(name: &str, spans: &[(u64, u64, u64)]) -> (String, Vec<Span>) {
        let at = |ms| crate::report::time(ms).unwrap();
        let spans = spans.iter().map(|&(generation, from, through)| Span {
            generation,
            from: at(from),
            through: at(through),
        });
        (name.to_owned(), spans.collect())
    }

    fn found(of_volumes: &[(String, Vec<Span>)]) -> Vec<Vec<u64>> {
        let found = common(of_volumes).into_iter();
        found
            .map(|common| common.generations.into_values().collect())
            .collect()
    }

    #[test]
    fn a_moment_is_common_where_each_volume_was_cut_then_or_is_known_not_to_have_changed() {
        let data = volume("data", &[(1, 100, 100), (2, 200, 200), (4, 400, 500)]);
        let wal = volume("wal", &[(1, 100, 200), (2, 300, 300), (3, 400, 400)]);
        assert_eq!(found(&[data, wal]), [[4, 3], [2, 1], [1, 1]]);
    }

    #[test]
    fn volumes_that_were_never_cut_together_have_none() {
        let data = volume("data", &[(1, 100, 100)]);
        let other = volume("other", &[(1, 101, 101)]);
        assert_eq!(found(&[data.clone(), other]), Vec::<Vec<u64>>::new());
        assert_eq!(found(&[data, volume("none", &[])]), Vec::<Vec<u64>>::new());
    }
}
