//! An export in memory: pages in a map, for tests, trials and as an example of [`Export`].

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};

use crate::consts::allocation;
use crate::errno::{Errno, Fault};
use crate::export::{
    Client, Export, ExportInfo, Exports, Extent, Listed, OpenError, Piece, Purpose, ZeroOptions,
};

/// Bytes of a page.
const PAGE: u64 = 4096;

/// The context that tells [`state`] of each page.
pub const STATE_CONTEXT: &str = "memory:state";

/// Values of the context [`STATE_CONTEXT`].
pub mod state {
    /// No page.
    pub const HOLE: u64 = 0;
    /// A page of zeroes that takes no memory.
    pub const ZERO: u64 = 1;
    /// A page of data.
    pub const DATA: u64 = 2;
}

#[derive(Debug, Clone)]
enum Page {
    Zero,
    Data(Box<[u8]>),
}

/// A sparse disk in memory.
#[derive(Debug)]
pub struct MemoryExport {
    info: ExportInfo,
    pages_max: usize,
    pages: Mutex<BTreeMap<u64, Page>>,
}

impl MemoryExport {
    /// An empty disk that takes at most `bytes_max` of memory; then writes fail with `ENOSPC`.
    pub fn new(mut info: ExportInfo, bytes_max: u64) -> Self {
        info.contexts = vec![STATE_CONTEXT.to_owned()];
        let pages_max = usize::try_from(bytes_max / PAGE).unwrap_or(usize::MAX);
        Self { info, pages_max, pages: Mutex::new(BTreeMap::new()) }
    }

    /// Pages that are present.
    pub fn pages(&self) -> usize {
        self.lock().len()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Page>> {
        // No code that holds the lock can leave a page half changed.
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `each` with every page number that the range touches, where in the page, and where in
    /// the range.
    fn for_pages(offset: u64, length: u64, mut each: impl FnMut(u64, usize, usize, usize)) {
        let mut done = 0;
        while done < length {
            let (page, within) = ((offset + done) / PAGE, (offset + done) % PAGE);
            let step = (PAGE - within).min(length - done);
            each(page, within as usize, step as usize, done as usize);
            done += step;
        }
    }

    fn room(&self, pages: &BTreeMap<u64, Page>, offset: u64, length: u64) -> Result<(), Fault> {
        let (first, last) = (offset / PAGE, (offset + length - 1) / PAGE);
        let present = pages.range(first..=last).count() as u64;
        let new = last - first + 1 - present;
        if pages.len() as u64 + new > self.pages_max as u64 {
            return Err(Errno::NoSpc.into());
        }
        Ok(())
    }

    /// Removes whole pages in the range, zeroes parts of pages at its edges.
    fn clear(pages: &mut BTreeMap<u64, Page>, offset: u64, length: u64) {
        let end = offset + length;
        let (first, last) = (offset.div_ceil(PAGE), end / PAGE);
        if first < last {
            let mut tail = pages.split_off(&first);
            pages.append(&mut tail.split_off(&last));
        }
        let mut zero = |from: u64, to: u64| {
            if from < to
                && let Some(Page::Data(data)) = pages.get_mut(&(from / PAGE))
            {
                let start = (from % PAGE) as usize;
                data[start..start + (to - from) as usize].fill(0);
            }
        };
        if first > last {
            zero(offset, end);
        } else {
            zero(offset, first * PAGE);
            zero(last * PAGE, end);
        }
    }
}

#[async_trait]
impl Export for MemoryExport {
    fn info(&self) -> ExportInfo {
        self.info.clone()
    }

    async fn read(&self, offset: u64, length: u32) -> Result<Vec<Piece>, Fault> {
        let pages = self.lock();
        let mut pieces: Vec<Piece> = Vec::new();
        let mut open = BytesMut::new();
        Self::for_pages(offset, u64::from(length), |page, within, step, _| {
            match (pages.get(&page), pieces.last_mut()) {
                (Some(Page::Data(data)), _) => {
                    open.extend_from_slice(&data[within..within + step]);
                }
                (_, Some(Piece::Zeroes(run))) if open.is_empty() => *run += step as u64,
                _ => {
                    if !open.is_empty() {
                        pieces.push(Piece::Data(open.split().freeze()));
                    }
                    pieces.push(Piece::Zeroes(step as u64));
                }
            }
        });
        if !open.is_empty() {
            pieces.push(Piece::Data(open.freeze()));
        }
        Ok(pieces)
    }

    async fn write(&self, offset: u64, data: Bytes, _fua: bool) -> Result<(), Fault> {
        let mut pages = self.lock();
        self.room(&pages, offset, data.len() as u64)?;
        Self::for_pages(offset, data.len() as u64, |number, within, step, at| {
            let page = pages.entry(number).or_insert(Page::Zero);
            if let Page::Zero = page {
                *page = Page::Data(vec![0; PAGE as usize].into_boxed_slice());
            }
            if let Page::Data(bytes) = page {
                bytes[within..within + step].copy_from_slice(&data[at..at + step]);
            }
        });
        Ok(())
    }

    async fn flush(&self) -> Result<(), Fault> {
        Ok(())
    }

    async fn trim(&self, offset: u64, length: u64, _fua: bool) -> Result<(), Fault> {
        Self::clear(&mut self.lock(), offset, length);
        Ok(())
    }

    async fn write_zeroes(&self, offset: u64, length: u64, how: ZeroOptions) -> Result<(), Fault> {
        let mut pages = self.lock();
        if how.no_hole {
            self.room(&pages, offset, length)?;
        }
        Self::clear(&mut pages, offset, length);
        if how.no_hole {
            for page in offset / PAGE..=(offset + length - 1) / PAGE {
                pages.entry(page).or_insert(Page::Zero);
            }
        }
        Ok(())
    }

    async fn block_status(
        &self,
        context: &str,
        offset: u64,
        length: u64,
        extents_max: usize,
    ) -> Result<Vec<Extent>, Fault> {
        let is_allocation = context == allocation::CONTEXT;
        let flags = |page: Option<&Page>| match (is_allocation, page) {
            (true, None) => allocation::HOLE | allocation::ZERO,
            (true, Some(Page::Zero)) => allocation::ZERO,
            (true, Some(Page::Data(_))) => 0,
            (false, None) => state::HOLE,
            (false, Some(Page::Zero)) => state::ZERO,
            (false, Some(Page::Data(_))) => state::DATA,
        };
        let pages = self.lock();
        let (end, mut at) = (offset + length, offset);
        let mut extents: Vec<Extent> = Vec::new();
        while at < end {
            let number = at / PAGE;
            let page = pages.get(&number);
            // Without a page the hole reaches to the next one.
            let until = match page {
                Some(_) => (number + 1) * PAGE,
                None => pages.range(number..).next().map_or(end, |(next, _)| next * PAGE),
            };
            let (length, flags) = (until.min(end) - at, flags(page));
            let told = extents.len();
            match extents.last_mut() {
                Some(last) if last.flags == flags => last.length += length,
                _ if told == extents_max => break,
                _ => extents.push(Extent { length, flags }),
            }
            at += length;
        }
        Ok(extents)
    }
}

/// A fixed set of exports, open to everybody. The empty name opens the first by name.
#[derive(Clone, Default)]
pub struct FixedExports {
    exports: BTreeMap<String, Arc<dyn Export>>,
}

impl FixedExports {
    /// These exports under the names in their `info()`.
    pub fn new(exports: impl IntoIterator<Item = Arc<dyn Export>>) -> Self {
        let named = exports.into_iter().map(|export| (export.info().name, export));
        Self { exports: named.collect() }
    }
}

#[async_trait]
impl Exports for FixedExports {
    async fn open(
        &self,
        name: &str,
        _client: &Client,
        _purpose: Purpose,
    ) -> Result<Arc<dyn Export>, OpenError> {
        let export = match name {
            "" => self.exports.values().next(),
            name => self.exports.get(name),
        };
        export.cloned().ok_or(OpenError::Unknown)
    }

    async fn list(&self, _client: &Client) -> Result<Vec<Listed>, OpenError> {
        let listed = self.exports.iter().map(|(name, export)| Listed {
            name: name.clone(),
            description: export.info().description,
        });
        Ok(listed.collect())
    }
}
