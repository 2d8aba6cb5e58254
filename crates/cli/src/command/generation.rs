//! `tidemark generation …`.

mod common;

use tidemark_proto::vault::v1::{GetGenerationRequest, ListGenerationsRequest};

use crate::{
    args::{GenerationCommand, Global},
    failure::Failure,
    format, output,
    report::{Generation, graded},
};

pub(super) async fn run(global: &Global, command: GenerationCommand) -> Result<(), Failure> {
    match command {
        GenerationCommand::List { volume } => list(global, volume).await,
        GenerationCommand::Common { volumes } => common::run(global, volumes).await,
        GenerationCommand::Show { generation: asked } => {
            let request = GetGenerationRequest {
                volume: asked.volume.clone(),
                generation: asked.generation.unwrap_or(0),
            };
            let found = global.vault().await?.get_generation(request).await?;
            let found = Generation::new(&found.into_inner())?;
            output::print(global.json, &found, &describe(&asked.volume, &found))
        }
    }
}

/// The retained generations of a volume, oldest first.
async fn retained(global: &Global, volume: String) -> Result<Vec<Generation>, Failure> {
    let request = ListGenerationsRequest { volume };
    let listed = global.vault().await?.list_generations(request).await?;
    let generations = listed.into_inner().generations;
    generations.iter().map(Generation::new).collect()
}

async fn list(global: &Global, volume: String) -> Result<(), Failure> {
    let generations = retained(global, volume.clone()).await?;
    let text = if generations.is_empty() {
        format!("no generations of {volume} yet; `tidemark ship {volume}` makes one\n")
    } else {
        table(&generations)
    };
    output::print(global.json, &generations, &text)
}

const DAMAGED: &str = "the vault's scrub has found stored objects damaged";

fn table(generations: &[Generation]) -> String {
    let rows: Vec<_> = generations
        .iter()
        .map(|g| {
            [
                g.generation.to_string(),
                format::time(g.cut_time),
                format::time(g.current_through),
                g.changed_blocks.to_string(),
                format::bytes(g.bytes_sent),
                g.coherence.to_owned(),
                g.image_digest.clone(),
                g.coherence_reason.clone(),
            ]
        })
        .collect();
    let mut text = format::table(
        [
            "GENERATION",
            "CUT",
            "CURRENT THROUGH",
            "CHANGED",
            "SENT",
            "COHERENCE",
            "IMAGE DIGEST",
            "WHY NO BETTER",
        ],
        &rows,
    );
    for g in generations.iter().filter(|g| g.damaged) {
        text.push_str(&format!(
            "{} can't be read whole: {DAMAGED}\n",
            g.generation
        ));
    }
    text
}

fn describe(volume: &str, g: &Generation) -> String {
    let mut fields = vec![
        ("generation", format!("{volume}@{}", g.generation)),
        ("parent", g.parent.to_string()),
        ("term", g.term.to_string()),
        ("image digest", g.image_digest.clone()),
        (
            "size",
            format!(
                "{} ({} bytes, blocks of {})",
                format::bytes(g.size),
                g.size,
                format::bytes(g.block_size.into())
            ),
        ),
        ("cut", format::time(g.cut_time)),
        ("committed", format::time(g.committed_time)),
        ("current through", format::time(g.current_through)),
        ("coherence", graded(g.coherence, &g.coherence_reason)),
        ("trigger", g.trigger.to_owned()),
        ("changed", format!("{} blocks", g.changed_blocks)),
        ("sent", format::bytes(g.bytes_sent)),
        ("epoch", g.epoch.to_string()),
        ("interval", g.interval_id.clone()),
    ];
    if g.damaged {
        fields.push(("damaged", DAMAGED.to_owned()));
    }
    format::fields(&fields)
}

#[cfg(test)]
mod tests {
    use tidemark_proto::{common::v1 as common, vault::v1 as vault};

    use super::*;

    fn example() -> Generation {
        Generation::new(&vault::Generation {
            generation: 7,
            parent: 6,
            term: 2,
            interval_id: vec![0x22; 16].into(),
            image_digest: vec![0xab; 16].into(),
            geometry: Some(common::Geometry {
                length: 8 << 30,
                block_size: 4096,
            }),
            cut_time_ms: 1_793_337_404_000,
            committed_time_ms: 1_793_337_405_250,
            current_through_ms: 1_793_337_500_000,
            coherence: common::Coherence::Crash.into(),
            trigger: common::Trigger::IntervalMax.into(),
            changed_blocks: 12,
            frame_bytes: 20_000,
            epoch: 9,
            damaged: true,
            coherence_reason: "agent db went away; writes without a pause of 50ms for 2s".into(),
        })
        .unwrap()
    }

    #[test]
    fn a_generation_is_printed_for_people_and_for_programs() {
        insta::assert_snapshot!(table(&[example()]));
        insta::assert_snapshot!(describe("data", &example()));
        insta::assert_json_snapshot!(example());
    }
}
