//! A source of intervals: an image in memory that changes, and what a capture service would ship of it.

use std::{collections::BTreeSet, net::SocketAddr, path::Path, time::Duration};

use bytes::Bytes;
use tidemark_block::{
    BlockCount, BlockIndex, BlockSize, CodecChoice, Coherence, DigestUpdate, Epoch, Extent,
    FrameDecoder, FrameEncoder, GenerationId, Geometry, ImageDigest, IntervalHeader, IntervalId,
    IntervalSeal, MemoryTable, Receipt, Trigger, UnverifiedFrame, VolumeId, WriterTerm,
    block_checksum, image_digest, is_zero,
};
use tidemark_proto::{
    RpcError,
    convert::{FrameBatch, ShipAnswer, ShipMessage, TermGrant, TermRequest},
    vault::v1::{
        RestoreRequest, ingest_client::IngestClient, restore_response::Message,
        vault_client::VaultClient,
    },
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Channel};
use vault_svc::{Config, Running, config::ByteSize};

pub(crate) const BLOCK: usize = 4096;

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

/// Numbers that look random and are always the same.
#[derive(Debug, Clone)]
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub(crate) fn id(&mut self) -> [u8; 16] {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.next().to_le_bytes());
        id[8..].copy_from_slice(&self.next().to_le_bytes());
        id
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

/// All messages of one interval.
#[derive(Debug, Clone)]
pub(crate) struct Prepared {
    pub(crate) header: IntervalHeader,
    pub(crate) batches: Vec<FrameBatch>,
    pub(crate) seal: IntervalSeal,
}

pub(crate) struct Source {
    pub(crate) volume: VolumeId,
    pub(crate) geometry: Geometry,
    pub(crate) image: Vec<u8>,
    /// Of the base generation.
    table: MemoryTable,
    pub(crate) changed: BTreeSet<u64>,
    pub(crate) base: GenerationId,
    pub(crate) term: WriterTerm,
    pub(crate) numbers: Numbers,
    pub(crate) batch_frames: usize,
    epoch: u64,
}

impl Source {
    pub(crate) fn new(seed: u64, blocks: u64) -> Self {
        let mut numbers = Numbers(seed);
        let geometry = Geometry::new(blocks * BLOCK as u64, BlockSize::new(4096).unwrap()).unwrap();
        Self {
            volume: VolumeId::from_bytes(numbers.id()),
            geometry,
            image: vec![0; usize::try_from(geometry.length()).unwrap()],
            table: MemoryTable::new(geometry),
            changed: BTreeSet::new(),
            base: GenerationId::ZERO,
            term: WriterTerm::ZERO,
            numbers,
            batch_frames: 4,
            epoch: 0,
        }
    }

    pub(crate) fn block(&mut self, block: u64) -> &mut [u8] {
        let at = usize::try_from(block).unwrap() * BLOCK;
        &mut self.image[at..at + BLOCK]
    }

    /// Fills a block with bytes that don't compress.
    pub(crate) fn write(&mut self, block: u64) {
        let mut numbers = Numbers(self.numbers.next());
        for word in self.block(block).as_chunks_mut::<8>().0 {
            *word = numbers.next().to_le_bytes();
        }
        self.changed.insert(block);
    }

    pub(crate) fn zero(&mut self, blocks: std::ops::Range<u64>) {
        for block in blocks {
            self.block(block).fill(0);
            self.changed.insert(block);
        }
    }

    pub(crate) fn write_some(&mut self, count: u64) {
        let blocks = self.geometry.block_count().get();
        for _ in 0..count {
            let block = self.numbers.below(blocks);
            if self.numbers.below(8) == 0 {
                self.zero(block..block + 1);
            } else {
                self.write(block);
            }
        }
    }

    pub(crate) async fn start_term(
        &mut self,
        clients: &mut Clients,
    ) -> Result<TermGrant, RpcError> {
        let request = TermRequest {
            volume: self.volume,
            volume_name: "data".into(),
            source_name: "test".into(),
            geometry: self.geometry,
            last_term: self.term,
            nonce: self.numbers.id(),
        };
        let answer = clients
            .ingest
            .start_term(tidemark_proto::vault::v1::StartTermRequest::from(request))
            .await?;
        let grant = TermGrant::try_from(answer.into_inner()).unwrap();
        self.term = grant.term;
        Ok(grant)
    }

    /// Cuts: everything changed since the base becomes an interval.
    pub(crate) fn prepare(&mut self) -> Prepared {
        self.epoch += 1;
        let header = IntervalHeader {
            volume: self.volume,
            term: self.term,
            interval: IntervalId::from_bytes(self.numbers.id()),
            base: self.base,
            geometry: self.geometry,
            epoch: Epoch::new(self.epoch),
            cut_time_ms: 1_700_000_000_000 + self.epoch,
            coherence: Coherence::Crash,
            trigger: Trigger::Request,
        };
        let changed: Vec<u64> = self.changed.iter().copied().collect();
        let mut digest = DigestUpdate::new(self.geometry);
        let mut encoder = FrameEncoder::new(self.geometry);
        let mut frames: Vec<(u64, Vec<u8>)> = Vec::new();
        let zero = |image: &[u8], block: u64| {
            is_zero(&image[usize::try_from(block).unwrap() * BLOCK..][..BLOCK])
        };
        for run in changed.chunk_by(|a, b| zero(&self.image, *a) == zero(&self.image, *b)) {
            for part in run.chunks(64) {
                let mut out = Vec::new();
                let mut blocks = Vec::new();
                let mut data = Vec::new();
                for &block in part {
                    let bytes = &self.image[usize::try_from(block).unwrap() * BLOCK..][..BLOCK];
                    let checksum = block_checksum(bytes);
                    blocks.push((BlockIndex::new(block), checksum));
                    data.extend_from_slice(bytes);
                    let Ok(()) = digest.push(&self.table, BlockIndex::new(block), checksum);
                }
                if zero(&self.image, part[0]) {
                    let extents: Vec<Extent> = part
                        .iter()
                        .map(|block| Extent::new(BlockIndex::new(*block), BlockCount::new(1)))
                        .collect();
                    encoder.encode_zero(&extents, &mut out);
                } else {
                    let choice = if self.numbers.below(2) == 0 {
                        CodecChoice::Raw
                    } else {
                        CodecChoice::Zstd(1)
                    };
                    encoder.encode_data(&blocks, &data, choice, &mut out);
                }
                frames.push((part[part.len() - 1] + 1, out));
            }
        }
        let Ok(image_digest) = digest.finish(&self.table);
        let seal = IntervalSeal {
            changed_blocks: BlockCount::new(changed.len() as u64),
            frame_count: frames.len() as u64,
            image_digest,
        };
        let batches = frames
            .chunks(self.batch_frames)
            .map(|part| FrameBatch {
                end: BlockIndex::new(part[part.len() - 1].0),
                frames: Bytes::from(
                    part.iter()
                        .flat_map(|(_, bytes)| bytes.clone())
                        .collect::<Vec<u8>>(),
                ),
            })
            .collect();
        Prepared {
            header,
            batches,
            seal,
        }
    }

    /// The vault has committed what was changed.
    pub(crate) fn committed(&mut self, receipt: &Receipt) {
        for block in std::mem::take(&mut self.changed) {
            let checksum =
                block_checksum(&self.image[usize::try_from(block).unwrap() * BLOCK..][..BLOCK]);
            self.table.set(BlockIndex::new(block), checksum);
        }
        self.base = receipt.generation;
        assert_eq!(receipt.image_digest, self.digest());
    }

    pub(crate) fn digest(&self) -> ImageDigest {
        let Ok(digest) = image_digest(&self.table);
        digest
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
