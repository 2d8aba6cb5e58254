//! `tidemark.vault.v1.Vault`.

use std::{sync::Arc, time::Duration};

use futures::StreamExt;
use tidemark_identity::Caller;
use tidemark_proto::{
    Reason, RpcError,
    convert::{image_digest_field, interval_id_field, volume_id_field},
    vault::v1::{
        Generation, GetGenerationRequest, GetStatusRequest, ListGenerationsRequest,
        ListGenerationsResponse, ListVolumesRequest, ListVolumesResponse, MaintainRequest,
        MaintainResponse, RestoreEnd, RestoreHeader, RestoreRequest, RestoreResponse, ScrubRequest,
        ScrubResponse, ScrubState, VaultStatus, Volume as VolumeMessage, restore_response::Message,
        vault_server::Vault,
    },
};
use tidemark_tls::caller;
use tokio::sync::mpsc::{self, error::SendTimeoutError};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use vault_core::manifest::{self, Manifest};

use super::{Service, scrub, stopping, to_the_end};
use crate::{
    figures::Restored,
    image::{ImageReader, restore},
    volume::Volume,
};

/// Batches on their way to a reader.
const BATCHES_MAX: usize = 2;

#[tonic::async_trait]
impl Vault for Service {
    async fn list_volumes(
        &self,
        request: Request<ListVolumesRequest>,
    ) -> Result<Response<ListVolumesResponse>, Status> {
        Ok(Response::new(ListVolumesResponse {
            volumes: self.volumes_of(&caller(request.extensions())),
        }))
    }

    async fn list_generations(
        &self,
        request: Request<ListGenerationsRequest>,
    ) -> Result<Response<ListGenerationsResponse>, Status> {
        let caller = caller(request.extensions());
        let volume = self.vault.find(&request.into_inner().volume, &caller)?;
        let manifest = volume.manifest();
        let generations = manifest.generations.iter();
        Ok(Response::new(ListGenerationsResponse {
            generations: generations
                .map(|g| generation(&volume, &manifest, g))
                .collect(),
            volume: Some(volume_message(&volume)),
        }))
    }

    async fn get_generation(
        &self,
        request: Request<GetGenerationRequest>,
    ) -> Result<Response<Generation>, Status> {
        let caller = caller(request.extensions());
        let request = request.into_inner();
        let volume = self.vault.find(&request.volume, &caller)?;
        let reader = ImageReader::open(Arc::clone(&volume), request.generation)?;
        Ok(Response::new(generation(
            &volume,
            &volume.manifest(),
            reader.generation(),
        )))
    }

    type RestoreStream = ReceiverStream<Result<RestoreResponse, Status>>;

    async fn restore(
        &self,
        request: Request<RestoreRequest>,
    ) -> Result<Response<Self::RestoreStream>, Status> {
        let caller = caller(request.extensions());
        let request = request.into_inner();
        let volume = self.vault.find(&request.volume, &caller)?;
        let permit = Arc::clone(&self.restores)
            .try_acquire_owned()
            .map_err(|_| {
                RpcError::new(
                    Reason::LimitReached,
                    "the vault restores as many images as it may at the same time",
                    "try again later, or raise restores_max at the vault",
                )
            })?;
        let reader = Arc::new(ImageReader::open(Arc::clone(&volume), request.generation)?);
        let header = RestoreHeader {
            volume_id: volume_id_field(volume.id),
            generation: Some(generation(&volume, &volume.manifest(), reader.generation())),
        };
        let (answers, receiver) = mpsc::channel(BATCHES_MAX);
        let mut stop = self.stopping.clone();
        let answers = Answers {
            to: answers,
            unread_max: self.vault.config().stream_idle_max.get(),
        };
        tokio::spawn(async move {
            let mut bytes = 0;
            let sent = tokio::select! {
                sent = send_image(reader, header, &answers, &mut bytes) => sent,
                _ = stop.wait_for(|stop| *stop) => Err(stopping()),
            };
            let ended = sent.as_ref().map_or(Restored::Failed, |ended| *ended);
            volume.figures.restored(ended, bytes);
            // Whoever takes nothing more may take long to hear why.
            drop(permit);
            if let Err(error) = sent {
                let _ = answers.to.send(Err(error.into())).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn maintain(
        &self,
        request: Request<MaintainRequest>,
    ) -> Result<Response<MaintainResponse>, Status> {
        let caller = caller(request.extensions());
        let request = request.into_inner();
        let volumes = if request.volume.is_empty() {
            self.vault.volumes_of(&caller)
        } else {
            vec![self.vault.find(&request.volume, &caller)?]
        };
        let vault = Arc::clone(&self.vault);
        let volumes = to_the_end(async move {
            let mut done = Vec::new();
            for volume in volumes {
                done.push(vault.maintain(&volume, request.dry_run).await?);
            }
            Ok(done)
        })
        .await?;
        Ok(Response::new(MaintainResponse { volumes }))
    }

    type ScrubStream = ReceiverStream<Result<ScrubResponse, Status>>;

    async fn scrub(
        &self,
        request: Request<ScrubRequest>,
    ) -> Result<Response<Self::ScrubStream>, Status> {
        let caller = caller(request.extensions());
        let volume = self.vault.find(&request.into_inner().volume, &caller)?;
        let answers = scrub::stream(volume, self.stopping.clone())?;
        Ok(Response::new(answers))
    }

    async fn get_status(
        &self,
        request: Request<GetStatusRequest>,
    ) -> Result<Response<VaultStatus>, Status> {
        Ok(Response::new(VaultStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            volumes: self.volumes_of(&caller(request.extensions())),
        }))
    }
}

impl Service {
    fn volumes_of(&self, caller: &Caller) -> Vec<VolumeMessage> {
        self.vault
            .volumes_of(caller)
            .iter()
            .map(|volume| volume_message(volume))
            .collect()
    }
}

/// The way to whoever reads an image.
struct Answers {
    to: mpsc::Sender<Result<RestoreResponse, Status>>,
    /// How long it may take nothing.
    unread_max: Duration,
}

impl Answers {
    /// False where nobody wants more.
    async fn send(&self, message: Message) -> Result<bool, RpcError> {
        let answer = RestoreResponse {
            message: Some(message),
        };
        match self.to.send_timeout(Ok(answer), self.unread_max).await {
            Ok(()) => Ok(true),
            Err(SendTimeoutError::Closed(_)) => Ok(false),
            Err(SendTimeoutError::Timeout(_)) => Err(RpcError::new(
                Reason::TooSlow,
                format!("nothing was taken for {:?}", self.unread_max),
                "restore again where there is room to write to, or raise stream_idle_max at the vault",
            )),
        }
    }
}

/// Sends all of an image; `bytes` are those of its frames, as far as it came.
async fn send_image(
    reader: Arc<ImageReader>,
    header: RestoreHeader,
    answers: &Answers,
    bytes: &mut u64,
) -> Result<Restored, RpcError> {
    if !answers.send(Message::Header(header)).await? {
        return Ok(Restored::Abandoned);
    }
    let mut blocks_sent = 0;
    let mut batches = std::pin::pin!(restore::batches(reader));
    while let Some(batch) = batches.next().await {
        let batch = batch?;
        blocks_sent += batch.blocks;
        let length = batch.batch.frames.len() as u64;
        if !answers.send(Message::Frames(batch.batch.into())).await? {
            return Ok(Restored::Abandoned);
        }
        *bytes += length;
    }
    let all = answers
        .send(Message::End(RestoreEnd { blocks_sent }))
        .await?;
    Ok(if all {
        Restored::Completed
    } else {
        Restored::Abandoned
    })
}

fn volume_message(volume: &Volume) -> VolumeMessage {
    let manifest = volume.manifest();
    VolumeMessage {
        volume_id: volume_id_field(volume.id),
        name: manifest.name.clone(),
        source_name: manifest.source.clone(),
        geometry: Some(manifest.geometry.into()),
        term: manifest.term.get(),
        head_generation: manifest.head_id().get(),
        generations: manifest.generations.len() as u64,
        stored_bytes: manifest.stored_bytes(),
        current_through_ms: volume.current_through(&manifest),
        scrub: Some(scrub_state(volume)),
    }
}

fn scrub_state(volume: &Volume) -> ScrubState {
    let counts = volume.scrub.counts();
    ScrubState {
        passes: counts.passes,
        completed_ms: counts.completed_ms,
        bytes_done: counts.progress.bytes,
        bytes_total: counts.progress.bytes_total,
        damaged_objects: counts.damaged,
    }
}

fn generation(volume: &Volume, manifest: &Manifest, of: &manifest::Generation) -> Generation {
    let is_head = manifest.head_id() == of.id;
    let through = if is_head {
        volume.current_through(manifest)
    } else {
        of.cut_time_ms
    };
    Generation {
        generation: of.id.get(),
        parent: of.parent.get(),
        term: of.term.get(),
        interval_id: interval_id_field(of.interval),
        image_digest: image_digest_field(of.digest),
        geometry: Some(manifest.geometry.into()),
        cut_time_ms: of.cut_time_ms,
        committed_time_ms: of.committed_time_ms,
        current_through_ms: through,
        coherence: of.cut.coherence.code().into(),
        trigger: of.cut.trigger.code().into(),
        changed_blocks: of.changed_blocks,
        frame_bytes: of.frame_bytes,
        epoch: of.epoch.get(),
        damaged: volume.scrub.is_damaged(of.id),
        coherence_reason: of.reason.to_string(),
    }
}
