//! The front ends, NBD and FUSE: what they offer, and both as one to the rest of the service.
//!
//! Offered are the volumes that are served, writable, and each one's snapshots, read-only, under the name
//! `<volume>@<number>`; a snapshot is found by its label too. The list is that of the moment. A snapshot's name with
//! `+scratch` behind it, or `+scratch-<name>`, is a scratch of it: writable, and thrown away with its last client.

mod snapshot;

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use anyhow::{Context, Result};
use tidemark_export::{
    Export, ExportRegistry, Exports, FuseServer, NbdAddress, NbdServer, SNAPSHOT_SIGN, nbd::Limits,
};

pub(crate) use snapshot::SnapshotExports;

use crate::{
    config::{Config, NbdListen},
    registry::Registry,
    uplink::blocking,
};

/// What clients may ask for.
struct Offered {
    volumes: Arc<ExportRegistry>,
    /// A front end that can't end doesn't keep the volumes.
    registry: Weak<Registry>,
}

impl Exports for Offered {
    fn find(&self, name: &str) -> Option<Arc<Export>> {
        let Some((volume, snapshot)) = name.split_once(SNAPSHOT_SIGN) else {
            return self.volumes.find(name);
        };
        let volume = self.registry.upgrade()?.find(volume).ok()?;
        volume.serving().ok()?.find_snapshot(snapshot)
    }

    fn list(&self) -> Vec<Arc<Export>> {
        let Some(registry) = self.registry.upgrade() else {
            return Vec::new();
        };
        let mut all = self.volumes.list();
        for volume in registry.list() {
            if let Ok(serving) = volume.serving() {
                all.extend(serving.list_snapshots());
            }
        }
        all
    }
}

/// What clients connect to.
#[derive(Debug, Clone, Default)]
pub(crate) struct FrontEnds {
    nbd: Option<Arc<NbdServer>>,
    fuse: Option<Arc<FuseServer>>,
}

impl FrontEnds {
    /// Starts those that are configured.
    pub(crate) async fn start(config: &Config, registry: &Arc<Registry>) -> Result<Self> {
        let offered: Arc<dyn Exports> = Arc::new(Offered {
            volumes: Arc::clone(registry.exports()),
            registry: Arc::downgrade(registry),
        });
        let nbd = start_nbd(config, &offered)?;
        let fuse = match config.fuse_mount.clone() {
            at if at.as_os_str().is_empty() => None,
            at => {
                // Mounting waits for the kernel.
                let started = blocking(move || Ok(FuseServer::start(offered, &at)?));
                let fuse = started.await.context("start the FUSE front end")?;
                tracing::info!(at = %fuse.path().display(), "volumes and snapshots are files");
                Some(Arc::new(fuse))
            }
        };
        Ok(Self { nbd, fuse })
    }

    /// Where the NBD server listens.
    pub(crate) fn nbd_endpoints(&self) -> Vec<NbdListen> {
        let addresses = self.nbd.as_ref().map_or(&[][..], |nbd| nbd.addresses());
        addresses
            .iter()
            .map(|address| match address {
                NbdAddress::Unix(path) => NbdListen::Unix(path.clone()),
                NbdAddress::Tcp(address) => NbdListen::Tcp(*address),
            })
            .collect()
    }

    /// An export's URIs for NBD clients.
    pub(crate) fn nbd_uris(&self, name: &str) -> Vec<String> {
        let shown = |listen: NbdListen| match listen {
            NbdListen::Unix(path) => format!("nbd+unix:///{name}?socket={}", path.display()),
            NbdListen::Tcp(address) => format!("nbd://{address}/{name}"),
        };
        self.nbd_endpoints().into_iter().map(shown).collect()
    }

    /// A volume's file in the mounted directory; empty where nothing is mounted.
    pub(crate) fn fuse_path(&self, volume: &str) -> String {
        self.fuse.as_ref().map_or_else(String::new, |fuse| {
            let file = fuse.path().join(format!("{volume}.img"));
            file.display().to_string()
        })
    }

    /// Ends the clients of an export; that they are gone is seen by their count.
    pub(crate) fn disconnect(&self, export: &str) {
        if let Some(nbd) = &self.nbd {
            nbd.disconnect(export);
        }
        if let Some(fuse) = &self.fuse {
            fuse.disconnect(export);
        }
    }

    /// Ends all clients; what still runs has `grace`.
    pub(crate) async fn stop(&self, grace: Duration) {
        let nbd = self.nbd.clone();
        let ended =
            tokio::task::spawn_blocking(move || nbd.map_or(0, |nbd| nbd.stop(grace).cut_off));
        let fuse = self.fuse.clone();
        let unmounted =
            tokio::task::spawn_blocking(move || fuse.map_or(0, |fuse| fuse.stop(grace).cut_off));
        let cut_off = ended.await.unwrap_or(0);
        if cut_off > 0 {
            tracing::warn!(
                cut_off,
                "NBD clients were cut off in the middle of requests"
            );
        }
        let cut_off = unmounted.await.unwrap_or(0);
        if cut_off > 0 {
            tracing::warn!(
                cut_off,
                "unmounted while files were open: whoever has them open gets errors"
            );
        }
    }
}

fn start_nbd(config: &Config, offered: &Arc<dyn Exports>) -> Result<Option<Arc<NbdServer>>> {
    let addresses: Vec<_> = config
        .nbd
        .0
        .iter()
        .map(|listen| match listen {
            NbdListen::Unix(path) => NbdAddress::Unix(path.clone()),
            NbdListen::Tcp(address) => NbdAddress::Tcp(*address),
        })
        .collect();
    if addresses.is_empty() {
        return Ok(None);
    }
    let limits = Limits {
        connections_max: config.nbd_clients_max as usize,
        ..Limits::default()
    };
    let server = NbdServer::start(Arc::clone(offered), &addresses, limits);
    Ok(Some(Arc::new(server.context("start the NBD server")?)))
}
