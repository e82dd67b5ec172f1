//! All services in this process.

use std::path::Path;
use std::time::Duration;

use endio_chassis::shutdown::Shutdown;
use endio_testkit::client::Client;
use tempfile::TempDir;

use crate::services::{Conversion, STOP_WAIT, Store, address, bind, dialer, recorder};

/// A writeback service.
pub struct Writeback {
    /// Where it answers.
    pub url: String,
    config: endio_writeback::Config,
    shutdown: Shutdown,
    running: Option<endio_writeback::Running>,
}

impl Writeback {
    /// Starts one with its cache log in `directory`.
    pub async fn start(conversion: &str, directory: &Path) -> Self {
        let config = endio_writeback::Config {
            conversion: conversion.to_owned(),
            cache_dir: directory.to_owned(),
            ..endio_writeback::Config::default()
        };
        Self::start_with(config).await
    }

    /// Starts one with this configuration.
    pub async fn start_with(config: endio_writeback::Config) -> Self {
        let mut writeback =
            Self { url: String::new(), config, shutdown: Shutdown::new(), running: None };
        writeback.launch("127.0.0.1:0").await;
        writeback
    }

    async fn launch(&mut self, listen: &str) {
        let listener = bind(listen).await;
        self.url = listener.url().to_owned();
        self.shutdown = Shutdown::new();
        let deps = endio_writeback::Deps {
            listener,
            dialer: dialer(),
            recorder: recorder(),
            shutdown: self.shutdown.clone(),
        };
        let running = endio_writeback::start(self.config.clone(), deps).await;
        self.running = Some(running.expect("the writeback starts"));
    }

    /// A client of it.
    pub fn client(&self) -> Client {
        Client::new(&self.url)
    }

    /// Blocks that it has written anew because they lay in many pieces.
    pub fn defragmented_blocks(&self) -> u64 {
        let running = self.running.as_ref().expect("it runs");
        running.engine().metrics().defragmented_blocks.value()
    }

    /// Reads that met a bad copy, or a store that did not answer, and took another copy.
    pub fn reads_repaired(&self) -> u64 {
        let running = self.running.as_ref().expect("it runs");
        running.engine().metrics().reads_repaired.value()
    }

    /// Stops it; it must drain.
    pub async fn stop(&mut self) {
        self.shutdown.request();
        if let Some(running) = self.running.take() {
            let ended = tokio::time::timeout(STOP_WAIT, running.wait()).await;
            ended.expect("the writeback stops in time").expect("the writeback drains");
        }
    }

    /// Ends it without writing anything out, as a crash would.
    pub async fn crash(&mut self) {
        self.shutdown.force();
        if let Some(running) = self.running.take() {
            let ended = tokio::time::timeout(STOP_WAIT, running.wait()).await;
            // A stop that does not drain says so; that is what a crash is.
            let _ = ended.expect("a forced stop ends in time");
        }
    }

    /// Starts it again after it ended, on the same port.
    pub async fn start_again(&mut self) {
        let url = self.url.clone();
        self.launch(address(&url)).await;
    }

    /// Waits for a start that fails by itself; returns why.
    pub async fn fails(&mut self) -> endio_writeback::RunError {
        let running = self.running.take().expect("it was started");
        let ended = tokio::time::timeout(STOP_WAIT, running.wait()).await;
        ended.expect("it ends in time").expect_err("it does not end well")
    }

    /// Stops it and starts it again on the same port.
    pub async fn restart(&mut self) {
        self.stop().await;
        self.start_again().await;
    }
}

/// The whole of it.
pub struct Stack {
    /// The conversion service.
    pub conversion: Conversion,
    /// The block-stores.
    pub stores: Vec<Store>,
    /// The writeback.
    pub writeback: Writeback,
    /// Where files are kept.
    pub directory: TempDir,
}

impl Stack {
    /// One conversion, so many block-stores, one writeback, all ready.
    pub async fn start(stores: usize) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let conversion = Conversion::start(directory.path()).await;
        let mut list = Vec::new();
        for _ in 0..stores {
            list.push(Store::start(&conversion.url).await);
        }
        let cache = directory.path().join("cache");
        let writeback = Writeback::start(&conversion.url, &cache).await;
        let stack = Self { conversion, stores: list, writeback, directory };
        stack.wait_for_stores(stores).await;
        stack
    }

    /// Waits, bounded, until so many stores are live.
    pub async fn wait_for_stores(&self, count: usize) {
        let client = self.client();
        for _ in 0..500 {
            let request = endio_api::conversion::ListStoresRequest {};
            if let Ok(listed) = client.inspect().stores(request).await {
                let stores = listed.into_inner().stores;
                if stores.iter().filter(|store| store.live).count() == count {
                    return;
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("there are not {count} live stores")
    }

    /// A client of the writeback.
    pub fn client(&self) -> Client {
        self.writeback.client()
    }

    /// Stops everything in order; each must drain.
    pub async fn stop(&mut self) {
        self.writeback.stop().await;
        for store in &mut self.stores {
            store.stop().await;
        }
        self.conversion.stop().await;
    }
}
