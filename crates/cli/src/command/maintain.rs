//! `tidemark maintain`.

use tidemark_proto::vault::v1::MaintainRequest;

use crate::{
    args::{Global, MaintainArgs},
    failure::Failure,
    format, output,
    progress::Progress,
    report::Maintained,
};

pub(super) async fn run(global: &Global, args: MaintainArgs) -> Result<(), Failure> {
    let request = MaintainRequest {
        volume: args.volume.unwrap_or_default(),
        dry_run: args.dry_run,
    };
    let progress = Progress::spinner("the vault is at work");
    let answer = global.vault().await?.maintain(request).await?;
    drop(progress);
    let volumes = answer
        .into_inner()
        .volumes
        .into_iter()
        .map(Maintained::new)
        .collect::<Result<Vec<_>, _>>()?;
    let mut text = table(&volumes);
    if args.dry_run {
        text.push_str("nothing was done: this is what would be\n");
    }
    output::print(global.json, &volumes, &text)
}

fn table(volumes: &[Maintained]) -> String {
    let rows: Vec<_> = volumes
        .iter()
        .map(|v| {
            [
                v.volume.clone(),
                v.retired_generations.len().to_string(),
                v.condemned_segments.to_string(),
                format::bytes(v.rewritten_bytes),
                v.deleted_segments.to_string(),
                format::bytes(v.freed_bytes),
                format::bytes(v.stored_bytes),
                format::bytes(v.live_bytes),
            ]
        })
        .collect();
    format::table(
        [
            "VOLUME",
            "RETIRED",
            "CONDEMNED",
            "REWRITTEN",
            "DELETED",
            "FREED",
            "STORED",
            "LIVE",
        ],
        &rows,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_is_one_line_per_volume() {
        let volume = Maintained {
            volume: "data".into(),
            id: "11111111-1111-1111-1111-111111111111".into(),
            retired_generations: vec![3, 4],
            condemned_segments: 5,
            rewritten_bytes: 1 << 20,
            deleted_segments: 0,
            freed_bytes: 0,
            stored_bytes: 90 << 20,
            live_bytes: 80 << 20,
        };
        insta::assert_snapshot!(table(&[volume]));
    }
}
