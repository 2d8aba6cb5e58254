//! What a source and a vault do in a history. Each act can be repeated after it failed.

use tidemark_proto::{RpcError, convert::CurrentMark};

use super::{World, invariants};
use crate::{
    interval::Prepared,
    ship::{Begun, Session, mark_current},
};

/// One act of a history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Act {
    /// The vault is opened: the first time it makes its marker.
    Open,
    /// The source asks for its next term: the first time the volume is made.
    StartTerm,
    /// The source writes here and there.
    Write(u64),
    /// It writes to the first blocks.
    WriteFirst(u64),
    /// It zeroes the first half.
    Zero,
    /// It ships what has changed, or goes on with what it had begun to ship.
    Ship,
    /// It ships half of what has changed, and hangs up.
    ShipHalf,
    /// It gives up what it ships: the blocks go with the next interval.
    GiveUp,
    /// It sends the last interval again, of which it has a receipt.
    ShipAgain,
    /// It says that nothing has changed.
    Mark,
    /// The vault stamps its checksum table.
    Stamp,
    /// The vault retires, reclaims and deletes.
    Pass,
    /// The same when every object is old, so that what is not named goes.
    PassOverStrays,
}

impl World {
    pub(super) async fn perform(&mut self, act: Act) -> Result<(), RpcError> {
        match act {
            Act::Open => self.vault().await.map(|_| ()),
            Act::StartTerm => self.start_term().await,
            Act::Write(count) => {
                self.source.write_some(count);
                Ok(())
            }
            Act::WriteFirst(count) => {
                (0..count).for_each(|block| self.source.write(block));
                Ok(())
            }
            Act::Zero => {
                let half = self.source.geometry.block_count().get() / 2;
                self.source.zero(0..half);
                Ok(())
            }
            Act::Ship => self.ship().await,
            Act::ShipHalf => self.ship_half().await,
            Act::GiveUp => {
                self.flying = None;
                self.acknowledged = 0;
                Ok(())
            }
            Act::ShipAgain => self.ship_again().await,
            Act::Mark => self.mark().await,
            Act::Stamp => self.stamp().await,
            Act::Pass => self.pass(false).await,
            Act::PassOverStrays => self.pass(true).await,
        }
    }

    async fn start_term(&mut self) -> Result<(), RpcError> {
        if self.asked.is_none() {
            self.asked = Some(self.source.term_request());
        }
        let Some(request) = self.asked.clone() else {
            unreachable!()
        };
        let grant = self
            .vault()
            .await?
            .start_term(request, &tidemark_identity::Caller::Local)
            .await?;
        self.source.term = grant.term;
        self.asked = None;
        Ok(())
    }

    fn cut(&mut self) -> Prepared {
        let mut prepared = match self.flying.take() {
            Some(prepared) => prepared,
            None => self.source.prepare(),
        };
        prepared.header.term = self.source.term;
        let image = self.source.image.clone();
        self.images.insert(prepared.header.interval, image);
        self.flying.insert(prepared).clone()
    }

    /// Sends the batches that end between what is durable and `until`; each becomes a part.
    async fn send(
        &mut self,
        session: &mut Session,
        prepared: &Prepared,
        until: usize,
    ) -> Result<(), RpcError> {
        let durable = session.durable()?.end;
        invariants::doubt_is_local(self.acknowledged, durable.get());
        let batches = prepared.batches[..until].iter();
        for batch in batches.filter(|batch| batch.end > durable) {
            session.batch(batch.clone()).await?;
            while session.has_pending() {
                session.close_part()?;
                self.acknowledged = session.progress().await?.end.get();
            }
        }
        Ok(())
    }

    async fn ship(&mut self) -> Result<(), RpcError> {
        let prepared = self.cut();
        let receipt = match self
            .vault()
            .await?
            .ship(prepared.header.clone(), &tidemark_identity::Caller::Local)
            .await?
        {
            Begun::Committed(receipt) => receipt,
            Begun::Open(mut session) => {
                let all = prepared.batches.len();
                self.send(&mut session, &prepared, all).await?;
                session.commit(prepared.seal).await?
            }
        };
        assert_eq!(receipt.interval, prepared.header.interval);
        self.source.committed(&receipt);
        self.flying = None;
        self.acknowledged = 0;
        self.last = Some((prepared, receipt));
        Ok(())
    }

    async fn ship_half(&mut self) -> Result<(), RpcError> {
        let prepared = self.cut();
        match self
            .vault()
            .await?
            .ship(prepared.header.clone(), &tidemark_identity::Caller::Local)
            .await?
        {
            Begun::Committed(_) => panic!("half an interval was committed"),
            Begun::Open(mut session) => {
                let half = prepared.batches.len() / 2;
                self.send(&mut session, &prepared, half).await?;
                session.abandon().await;
                Ok(())
            }
        }
    }

    async fn ship_again(&mut self) -> Result<(), RpcError> {
        let Some((mut prepared, receipt)) = self.last.clone() else {
            panic!("nothing was shipped")
        };
        prepared.header.term = self.source.term;
        match self
            .vault()
            .await?
            .ship(prepared.header, &tidemark_identity::Caller::Local)
            .await?
        {
            Begun::Committed(again) => assert_eq!(again, receipt),
            Begun::Open(_) => panic!("a committed interval was let in again"),
        }
        Ok(())
    }

    async fn mark(&mut self) -> Result<(), RpcError> {
        let volume = self.volume().await?;
        let (prepared, receipt) = self.last.clone().expect("something was shipped");
        let mark = CurrentMark {
            volume: volume.id,
            term: self.source.term,
            interval: prepared.header.interval,
            generation: receipt.generation,
            image_digest: receipt.image_digest,
            cut_time_ms: receipt.cut_time_ms + 1,
        };
        mark_current(&volume, &mark)?;
        volume
            .write_current()
            .await
            .map_err(|error| RpcError::internal(error.to_string()))
    }

    async fn stamp(&mut self) -> Result<(), RpcError> {
        let volume = self.volume().await?;
        volume.table_at_head().await?;
        volume.stamp_table().await?;
        self.stamped = Some(std::fs::read(self.table_path()).unwrap());
        Ok(())
    }

    async fn pass(&mut self, aged: bool) -> Result<(), RpcError> {
        let vault = self.vault().await?;
        let volume = vault.volume(self.source.volume)?;
        self.fuse.age(aged);
        let passed = vault.pass(&volume, true).await;
        self.fuse.age(false);
        passed.map(|_| ())
    }
}
