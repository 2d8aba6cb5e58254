//! Readopting a volume: its file is taken as it is now, and every block is compared.

use std::sync::Arc;

use tidemark_proto::{Reason, RpcError};

use super::{Registry, local};
use crate::{
    uplink::{Request, blocking},
    volume::{Serving, Volume},
};

impl Registry {
    /// Takes a volume's file as it is now. One that isn't served is opened, even if it is not the recorded one; one that
    /// is served goes on, with every block in doubt.
    pub(crate) async fn readopt(&self, text: &str) -> Result<(), RpcError> {
        self.stopping()?;
        let _change = self.change.lock().await;
        let volume = self.find(text)?;
        match volume.serving() {
            Ok(serving) => doubt(&volume, serving).await?,
            Err(_) => {
                let opened = self.try_open(&volume, true).await;
                opened.map_err(|error| local(&error))?;
            }
        }
        tracing::warn!(volume = %volume.record.name, "readopted: every block is compared");
        Ok(())
    }
}

/// Puts every block of a served volume in doubt, and has an interval come soon.
async fn doubt(volume: &Arc<Volume>, serving: Arc<Serving>) -> Result<(), RpcError> {
    let (requests, tried) = (serving.uplink.requests(), Arc::clone(volume));
    let same = blocking(move || {
        let same = serving.engine.has_open(&tried.record.file)?;
        if same {
            serving
                .engine
                .doubt_everything("the volume was readopted")?;
        }
        Ok(same)
    });
    if !same.await.map_err(|e| local(&e))? {
        return Err(RpcError::new(
            Reason::VolumeFileInUse,
            format!(
                "volume {} is served from the file that was at {} before",
                volume.record.name,
                volume.record.file.display()
            ),
            "restart the service, which lets go of that file, then readopt the volume",
        ));
    }
    // Full means that an interval will come anyway.
    let _ = requests.try_send(Request::Doubted);
    Ok(())
}
