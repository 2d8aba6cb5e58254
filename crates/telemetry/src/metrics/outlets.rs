//! The ways on which metrics leave a service: the endpoint, and pushes to the collector. Each where it is configured.

use std::{net::SocketAddr, sync::Arc};

use anyhow::Result;
use tidemark_config::OptionalAddr;
use tokio::sync::watch;

use super::{Bound, Endpoint, Push, Read};
use crate::Settings;

/// Both ways, not in use yet.
#[derive(Debug)]
pub struct Outlets {
    bound: Option<Bound>,
    push: Option<Push>,
}

impl Outlets {
    /// Takes the address of the endpoint, and sets the collector up. To be called within a runtime.
    ///
    /// # Errors
    /// The address is taken, or a file that the settings name can't be used.
    pub async fn open(listen: OptionalAddr, settings: &Settings<'_>) -> Result<Self> {
        let bound = match listen.0 {
            None => None,
            Some(addr) => Some(Bound::to(addr).await?),
        };
        let push = Push::to(settings)?;
        Ok(Self { bound, push })
    }

    /// Where the endpoint listens, if there is one.
    #[must_use]
    pub fn addr(&self) -> Option<SocketAddr> {
        self.bound.as_ref().map(|bound| bound.addr)
    }

    /// Lets readings out until told to stop.
    pub async fn run(self, read: Read, stop: watch::Receiver<bool>) {
        let pushing = async {
            if let Some(push) = self.push {
                push.run(Arc::clone(&read), stop.clone()).await;
            }
        };
        let serving = async {
            if let Some(bound) = self.bound {
                Endpoint::new(Arc::clone(&read))
                    .serve(bound, stop.clone())
                    .await;
            }
        };
        tokio::join!(pushing, serving);
    }
}
