//! A source and a reader over gRPC.

use std::{net::SocketAddr, path::Path, time::Duration};

use tidemark_block::{
    FrameDecoder, Geometry, ImageDigest, IntervalHeader, MemoryTable, Receipt, UnverifiedFrame,
    image_digest,
};
use tidemark_proto::{
    RpcError,
    convert::{ShipAnswer, ShipMessage, TermGrant},
    vault::v1::{
        RestoreRequest, ingest_client::IngestClient, restore_response::Message,
        vault_client::VaultClient,
    },
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Channel};
use vault_svc::{Config, Running, config::ByteSize};

use crate::interval::BLOCK;
pub(crate) use crate::interval::{Prepared, Source};

pub(crate) fn config(dir: &Path) -> Config {
    Config {
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        store_dir: dir.join("store"),
        state_dir: dir.join("state"),
        reserve_bytes: ByteSize::new(0),
        reader_grace: Duration::ZERO.into(),
        ..Config::default()
    }
}

pub(crate) struct Clients {
    pub(crate) ingest: IngestClient<Channel>,
    pub(crate) vault: VaultClient<Channel>,
}

pub(crate) async fn connect(running: &Running) -> Clients {
    let channel = Channel::from_shared(format!("http://{}", running.listen_addr))
        .unwrap()
        .initial_stream_window_size(80 << 20)
        .initial_connection_window_size(80 << 20)
        .connect()
        .await
        .unwrap();
    Clients {
        ingest: IngestClient::new(channel.clone()).max_decoding_message_size(4 << 20),
        vault: VaultClient::new(channel).max_decoding_message_size(4 << 20),
    }
}

impl Source {
    pub(crate) async fn start_term(
        &mut self,
        clients: &mut Clients,
    ) -> Result<TermGrant, RpcError> {
        let request = self.term_request();
        let answer = clients
            .ingest
            .start_term(tidemark_proto::vault::v1::StartTermRequest::from(request))
            .await?;
        let grant = TermGrant::try_from(answer.into_inner()).unwrap();
        self.term = grant.term;
        Ok(grant)
    }

    pub(crate) async fn ship(&mut self, clients: &mut Clients) -> Result<Receipt, RpcError> {
        let prepared = self.prepare();
        let receipt = ship(clients, &prepared).await?;
        self.committed(&receipt);
        Ok(receipt)
    }
}

/// A stream under way.
pub(crate) struct Wire {
    sender: Option<mpsc::Sender<tidemark_proto::vault::v1::ShipRequest>>,
    answers: Streaming<tidemark_proto::vault::v1::ShipResponse>,
}

impl Wire {
    pub(crate) async fn open(
        clients: &mut Clients,
        header: &IntervalHeader,
    ) -> Result<Self, RpcError> {
        let mut wire = Self::bare(clients).await?;
        wire.send(ShipMessage::Header(header.clone())).await;
        Ok(wire)
    }

    pub(crate) async fn bare(clients: &mut Clients) -> Result<Self, RpcError> {
        let (sender, receiver) = mpsc::channel(8);
        let answers = clients
            .ingest
            .ship(ReceiverStream::new(receiver))
            .await?
            .into_inner();
        Ok(Self {
            sender: Some(sender),
            answers,
        })
    }

    pub(crate) async fn send(&mut self, message: ShipMessage) {
        // A vault that has refused closes the stream: its answer says why.
        let _ = self.sender.as_ref().unwrap().send(message.into()).await;
    }

    pub(crate) async fn answer(&mut self) -> Result<ShipAnswer, RpcError> {
        match self.answers.message().await? {
            Some(answer) => Ok(ShipAnswer::try_from(answer).unwrap()),
            None => panic!("the stream ended without an answer"),
        }
    }

    pub(crate) async fn until_receipt(&mut self) -> Result<Receipt, RpcError> {
        loop {
            if let ShipAnswer::Receipt(receipt) = self.answer().await? {
                return Ok(receipt);
            }
        }
    }

    /// Ends our half of the stream.
    pub(crate) fn hang_up(&mut self) {
        self.sender = None;
    }
}

/// Ships an interval, from wherever the vault has it.
pub(crate) async fn ship(clients: &mut Clients, prepared: &Prepared) -> Result<Receipt, RpcError> {
    let mut wire = Wire::open(clients, &prepared.header).await?;
    let durable_end = match wire.answer().await? {
        ShipAnswer::Ready { durable_end } => durable_end,
        ShipAnswer::Receipt(receipt) => return Ok(receipt),
        other => panic!("{other:?}"),
    };
    for batch in prepared
        .batches
        .iter()
        .filter(|batch| batch.end > durable_end)
    {
        wire.send(ShipMessage::Frames(batch.clone())).await;
    }
    wire.send(ShipMessage::Seal(prepared.seal)).await;
    wire.until_receipt().await
}

/// Restores an image, and verifies what a reader of the stream has to.
pub(crate) async fn restore(
    clients: &mut Clients,
    source: &Source,
    generation: u64,
) -> Result<Vec<u8>, RpcError> {
    let geometry = source.geometry;
    let mut image = vec![0; usize::try_from(geometry.length()).unwrap()];
    let request = RestoreRequest {
        volume: source.volume.to_string(),
        generation,
    };
    let mut stream = clients.vault.restore(request).await?.into_inner();
    let mut decoder = FrameDecoder::new();
    let (mut behind, mut end, mut blocks) = (0, 0, 0);
    let mut ended = false;
    while let Some(message) = stream.message().await? {
        match message.message.unwrap() {
            Message::Header(header) => {
                assert_eq!(header.volume_id, source.volume.as_bytes().to_vec())
            }
            Message::Frames(batch) => {
                assert!(batch.end_block > end && batch.end_block <= geometry.block_count().get());
                assert!(batch.frames.len() < 3 << 20);
                end = batch.end_block;
                let mut bytes = batch.frames;
                while !bytes.is_empty() {
                    let (frame, rest) = UnverifiedFrame::split(bytes).unwrap();
                    bytes = rest;
                    for block in frame.verify(geometry, &mut decoder).unwrap().blocks() {
                        let n = block.block().get();
                        assert!(
                            n >= behind && n < end,
                            "block {n} is not in [{behind}, {end})"
                        );
                        behind = n + 1;
                        blocks += 1;
                        image[usize::try_from(n).unwrap() * BLOCK..][..BLOCK]
                            .copy_from_slice(block.bytes());
                    }
                }
            }
            Message::End(end) => {
                assert_eq!(end.blocks_sent, blocks);
                ended = true;
            }
        }
    }
    assert!(ended, "the stream has its end");
    Ok(image)
}

/// The vault's digest of an image, computed anew.
pub(crate) fn digest_of(geometry: Geometry, image: &[u8]) -> ImageDigest {
    let Ok(digest) = image_digest(&MemoryTable::of_image(geometry, image));
    digest
}
