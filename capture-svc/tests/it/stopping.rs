//! A service that is told to stop while it is at something.

use std::{
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
};

use capture_svc::engine::{EngineOptions, EngineSetup, Trust, intercept::Intercept};
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};
use tidemark_listen::health::check;
use tidemark_proto::convert::volume_id;
use tidemark_tls::Dialer;

use crate::rig::{PATIENCE, Rig, eventually, state_dir};

const BLOCK: usize = 4096;

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_is_just_being_opened_is_closed_as_cleanly_as_the_others() {
    let mut rig = Rig::new().await;
    let added = rig.add("data", 1024).await;
    rig.nbd("data").write(0, &[1; BLOCK]).unwrap();
    let state = state_dir(&rig, "data").await;
    rig.stop_capture().await;

    // Its file is not there, so it is tried again and again; then its record is a pipe, which keeps the next try waiting.
    let (file, away) = (rig.path("data.img"), rig.path("away"));
    fs::rename(&file, &away).unwrap();
    rig.start_capture().await;
    let (record, pipe) = (state.join("volume"), state.join("pipe"));
    let bytes = fs::read(&record).unwrap();
    mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    fs::rename(&pipe, &record).unwrap();
    fs::rename(&away, &file).unwrap();
    let mut at_work = eventually("a try", || async {
        let nonblocking = i32::try_from(OFlags::NONBLOCK.bits()).unwrap();
        let mut options = OpenOptions::new();
        // That fails as long as nobody reads it.
        options
            .write(true)
            .custom_flags(nonblocking)
            .open(&record)
            .ok()
    })
    .await;

    let url = format!("http://{}", rig.control_addr());
    let dialer = Dialer::default();
    let goes_on = async {
        eventually("the service to stop", || async {
            check(&dialer, &url, PATIENCE).await.err()
        })
        .await;
        at_work.write_all(&bytes).unwrap();
        drop(at_work);
    };
    tokio::join!(rig.stop_capture(), goes_on);
    fs::remove_file(&record).unwrap();
    fs::write(&record, &bytes).unwrap();

    let (engine, trust) = Intercept::open(EngineSetup {
        dir: &state,
        volume: volume_id(&added.volume_id).unwrap(),
        file: &file,
        geometry: added.geometry.unwrap().try_into().unwrap(),
        options: EngineOptions {
            spool_bytes_max: rig.config.spool_bytes_max.get(),
            ..EngineOptions::default()
        },
    })
    .unwrap();
    assert_eq!(trust, Trust::Clean, "it was closed");
    engine.close().unwrap();
    drop(engine);
    rig.start_capture().await;
    let volume = rig.volume("data").await;
    assert_eq!((&*volume.problem, volume.changed_blocks), ("", 1));
    assert_eq!(rig.ship("data").await.changed_blocks.get(), 1);
}
