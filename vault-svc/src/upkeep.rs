//! Looking after volumes in the background.

use std::sync::Arc;

use tidemark_proto::{RpcError, convert::volume_id_field, vault::v1::MaintainedVolume};

use crate::{vault::Vault, volume::Volume};

/// What is remembered of a volume between two passes.
#[derive(Debug, Default)]
pub(crate) struct Upkeep {}

impl Vault {
    /// Retires and reclaims, or shows what would be.
    pub(crate) async fn maintain(
        &self,
        volume: &Arc<Volume>,
        _dry_run: bool,
    ) -> Result<MaintainedVolume, RpcError> {
        let manifest = volume.manifest();
        Ok(MaintainedVolume {
            volume_id: volume_id_field(volume.id),
            name: manifest.name.clone(),
            ..MaintainedVolume::default()
        })
    }
}
