//! What a seed decides before anything runs: sizes, times, limits, and how often what fails.

use endio_state_machine::gate::GateLimits;
use endio_state_machine::limits::Limits;
use endio_state_machine::writeback::credit::CreditPolicy;
use endio_state_machine::writeback::sessions::SessionLimits;
use endio_state_machine::writeback::throttle;
use endio_store::cache_log::CacheLogOptions;
use endio_testkit::seed::Rng;
use endio_types::BLOCK_BYTES;

use crate::device::DeviceFaults;
use crate::exec::Exec;

/// Mixed into the seed for what came into the plans later: what was drawn before stays as it was.
pub const RARE: u64 = 0x7261_7265;
/// The same for what came later still.
const LATER: u64 = 0x6c61_7465_7221;

/// The same for deaths of writebacks alone; older seeds stay as they are.
const CROWD: u64 = 0x6372_6f77;

/// First seed that may draw them.
const CROWDED_FROM: u64 = 1_000_000;
/// The same for writes around the cache, and a log that does not take what is clean.
const AROUND: u64 = 0x6172_6f75;
const AROUND_FROM: u64 = 4_000_000;
/// The same for volumes that nobody uses for a while, between writebacks that take them from each other.
const LEAVE: u64 = 0x6c65_6176;
const LEAVE_FROM: u64 = 7_000_000;
/// The same for direct writes that share an io_end, and what is written anew with the data that it has.
const ANEW: u64 = 0x616e_6577;
const ANEW_FROM: u64 = 8_000_000;
/// Decides what came after that.
const NEWS: u64 = 0x6e65_7773;
/// From this seed on news of stores may come to writebacks late.
const NEWS_FROM: u64 = 27_000_000;
/// Decides what came after that.
const HEAP: u64 = 0x6865_6170;
/// From this seed on writes may lie over writes in a few blocks.
const HEAP_FROM: u64 = 29_000_000;

/// Numbers from one to another.
#[derive(Clone, Copy, Debug)]
pub struct Span(pub u64, pub u64);

impl Span {
    /// Draws one.
    pub fn draw(self, exec: &Exec) -> u64 {
        exec.between(self.0, self.1)
    }
}

/// A volume of the workload.
#[derive(Clone, Debug)]
pub struct VolumePlan {
    /// Copies.
    pub replicas: u32,
    /// Overwrites go where the blocks are.
    pub in_place: bool,
    /// Writes past the end extend it.
    pub growable: bool,
    /// Blocks at first.
    pub blocks: u64,
}

/// How often what happens, as weights; 0: never.
#[derive(Clone, Debug, Default)]
pub struct Chaos {
    /// Mean pause between two faults, milliseconds; 0: no faults at all.
    pub every_ms: u64,
    /// A process is killed.
    pub kill: u64,
    /// A node loses its power.
    pub power: u64,
    /// A node is frozen and wakes up later.
    pub pause: u64,
    /// A link is cut, one way or both.
    pub cut: u64,
    /// A stream breaks.
    pub break_stream: u64,
    /// A clock changes its speed, or jumps ahead.
    pub clock: u64,
    /// A volume is taken over by another writeback.
    pub takeover: u64,
    /// The metadata disk is full for a while.
    pub metadata_full: u64,
    /// A store is full for a while.
    pub store_full: u64,
    /// Conversion is stopped gracefully.
    pub stop: u64,
    /// Everything loses its power at once.
    pub blackout: u64,
}

/// Weights of what clients do.
#[derive(Clone, Debug)]
pub struct Mix {
    /// Buffered writes.
    pub buffered: u64,
    /// Direct writes.
    pub direct: u64,
    /// Reads.
    pub read: u64,
    /// fsync.
    pub fsync: u64,
    /// Trim.
    pub trim: u64,
    /// Zeroing.
    pub zero: u64,
    /// Allocation.
    pub allocate: u64,
    /// Resize.
    pub resize: u64,
    /// Close.
    pub close: u64,
    /// Delete, and create anew.
    pub delete: u64,
    /// Close, and come back later.
    pub leave: u64,
}

/// Everything that the seed decides.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Block-stores.
    pub stores: usize,
    /// Writebacks.
    pub writebacks: usize,
    /// Blocks of each store.
    pub capacity: u64,
    /// Volumes.
    pub volumes: Vec<VolumePlan>,
    /// Clients of each volume that work at once.
    pub workers: usize,
    /// Requests of each client.
    pub operations: usize,
    /// Longest write, in cells.
    pub cells_max: u64,
    /// Writes of whole blocks only, in percent.
    pub aligned: u64,
    /// What clients do.
    pub mix: Mix,
    /// What fails.
    pub chaos: Chaos,
    /// How disks fail.
    pub device: DeviceFaults,
    /// How long the faults last, milliseconds.
    pub chaos_ms: u64,
    /// Limits of the machine.
    pub limits: Limits,
    /// Limits of the gates.
    pub gate: GateLimits,
    /// Credit of writebacks.
    pub credit: CreditPolicy,
    /// Dirty bytes.
    pub throttle: throttle::Limits,
    /// Retry keys.
    pub sessions: SessionLimits,
    /// Cache logs.
    pub log: CacheLogOptions,
    /// A flush of a journal or log, microseconds.
    pub journal_us: Span,
    /// A write to a block device.
    pub write_us: Span,
    /// A read from one.
    pub read_us: Span,
    /// A flush of one.
    pub flush_us: Span,
    /// A message.
    pub delay_us: Span,
    /// Messages that take much longer, in thousandths.
    pub slow: u64,
    /// Reads that dawdle between map and stores, in thousandths.
    pub slow_read: u64,
    /// Unary calls that arrive after their caller gave up, in thousandths.
    pub late_calls: u64,
    /// Turns of conversion's driver that end with a full check, in thousandths.
    pub check_permille: u64,
    /// Most inputs of one turn.
    pub inputs_per_turn: usize,
    /// A request gives up after so long.
    pub io_timeout_ms: u64,
    /// One try of a call.
    pub call_timeout_ms: u64,
    /// Longest pause between tries.
    pub retry_max_ms: u64,
    /// Longest pause between connections.
    pub reconnect_ms: u64,
    /// Between confirmations of reads.
    pub confirm_ms: u64,
    /// Dirty data is written out after so long.
    pub write_out_after_ms: u64,
    /// Write-outs of a volume at once.
    pub write_outs: usize,
    /// Blocks of a write-out.
    pub write_out_blocks: u64,
    /// A graceful stop of conversion.
    pub drain_ms: u64,
    /// Bios and reads of which the network keeps a copy and delivers it later, in thousandths.
    pub late_bios: u64,
    /// Mean pause between two bits that flip where data is stored, milliseconds; 0: none does.
    pub rot_ms: u64,
    /// Runs of blocks of a volume's map that its writeback remembers; 0: none.
    pub map_entries: usize,
    /// Blocks of the map that a look-up asks for at once.
    pub learn_blocks: u64,
    /// Writes to a block device that hang for up to two leases while there are faults, in thousandths.
    pub hung_writes: u64,
    /// Whoever creates a volume asks over the network what was deleted before, and volumes are
    /// deleted often.
    pub late_creations: bool,
    /// Clean blocks of a volume that its writeback keeps for reads; 0: none.
    pub clean_blocks: usize,
    /// Most blocks that a flush sends to the data log; 0: none.
    pub flush_log_blocks: u64,
    /// Blocks of the data log in one answer.
    pub log_read_blocks: usize,
    /// Flushes that dawdle between picking their blocks and sending them, in thousandths.
    pub log_dawdles: u64,
    /// For how long they do at most, milliseconds.
    pub log_dawdle_ms: u64,
    /// Nothing is written out because it is old: whoever wants that has to say so.
    pub is_lazy: bool,
    /// Callers of a flush that go away soon, in thousandths.
    pub hasty_flushes: u64,
    /// Writes that write zeroes, in thousandths: what they write may be there already.
    pub zero_writes: u64,
    /// Buffered writes of at least so many blocks go straight to the stores; 0: none do.
    pub write_around_blocks: u64,
    /// How long such a write waits for the stores before the cache takes it, milliseconds.
    pub around_patience_ms: u64,
    /// Notes that blocks are clean which the log does not take, in thousandths.
    pub clean_fails: u64,
    /// Mean pause between two deaths of writebacks alone, milliseconds; 0: only as `chaos` says.
    pub writeback_death_ms: u64,
    /// Direct writes that come at the same time share an io_end.
    pub shares_io_ends: bool,
    /// Mean pause between two windows of a volume that are written anew with the data that they have,
    /// milliseconds; 0: none is.
    pub rewrite_ms: u64,
    /// Messages of a volume to the data log under way.
    pub log_messages_max: usize,
    /// Buffered writes whose data goes to the data log before a flush asks for it, in thousandths.
    pub logs_ahead: u64,
    /// Writes through the cache that are to be durable, in thousandths.
    pub durable_writes: u64,
    /// Reads go up to where acknowledged writes end, and not only what is durable.
    pub reads_all: bool,
    /// Writes and resizes around the end of volumes that grow, in thousandths.
    pub near_end: u64,
    /// Mean pause between two orderly stops of writebacks, milliseconds; 0: none.
    pub stops_ms: u64,
}

impl Plan {
    /// What a seed decides.
    pub fn draw(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let mut rare = Rng::new(seed ^ RARE);
        let late_bios = if rare.chance(30) { rare.between(5, 200) } else { 0 };
        let late_calls = if rare.chance(30) { rare.between(100, 1000) } else { 0 };
        let rot_ms = if rare.chance(12) { rare.between(5, 200) } else { 0 };
        let slow_journal = rare.chance(8).then(|| Span(1_000, rare.between(2_000, 40_000)));
        let punch_run_blocks = rare.between(1, 8);
        let punch_idle_ms = rare.between(1, 400);
        let unpunched_blocks_max = rare.between(1, 64);
        let reuse_blocks = rare.between(1, 64);
        let stores = rng.between(1, 4) as usize;
        let lies = rng.chance(15);
        let volumes: Vec<VolumePlan> = (0..rng.between(1, 3))
            .map(|_| {
                let in_place = !lies && rng.chance(25);
                let most = if in_place { 1 } else { stores.min(3) as u64 };
                VolumePlan {
                    replicas: rng.between(1, most) as u32,
                    in_place,
                    growable: rng.chance(30),
                    blocks: rng.between(2, 24),
                }
            })
            .collect();
        let lease_ms = rng.between(60, 600) as u32;
        let is_tight = rng.chance(30);
        let capacity = if is_tight { rng.between(40, 80) } else { rng.between(100, 400) };
        // Writebacks that die often, over stores that are full.
        let mut crowd = Rng::new(seed ^ CROWD);
        let is_crowded = seed >= CROWDED_FROM && crowd.chance(10);
        let writeback_death_ms = if is_crowded { crowd.between(20, 200) } else { 0 };
        let capacity = if is_crowded { crowd.between(12, 60) } else { capacity };
        let mut around = Rng::new(seed ^ AROUND);
        let goes_around = seed >= AROUND_FROM && around.chance(40);
        let write_around_blocks = if goes_around { around.between(1, 4) } else { 0 };
        let around_patience_ms = around.between(5, 1_000);
        let is_unnoted = seed >= AROUND_FROM && around.chance(25);
        let clean_fails = if is_unnoted { around.between(20, 400) } else { 0 };
        let some = |rng: &mut Rng, max: u64| if rng.chance(50) { rng.below(max + 1) } else { 0 };
        let chaos = Chaos {
            every_ms: if rng.chance(5) { 0 } else { rng.between(10, 250) },
            kill: some(&mut rng, 10),
            power: some(&mut rng, 6),
            pause: some(&mut rng, 8),
            cut: some(&mut rng, 10),
            break_stream: some(&mut rng, 10),
            clock: some(&mut rng, 4),
            takeover: some(&mut rng, 6),
            metadata_full: some(&mut rng, 2),
            store_full: some(&mut rng, 2),
            stop: some(&mut rng, 2),
            blackout: some(&mut rng, 1),
        };
        let device = DeviceFaults {
            write_error: some(&mut rng, 40),
            flush_error: some(&mut rng, 40),
            read_error: some(&mut rng, 40),
            lost_write: if lies { some(&mut rng, 20) } else { 0 },
            misdirected: if lies { some(&mut rng, 20) } else { 0 },
            flipped: if lies { some(&mut rng, 20) } else { 0 },
        };
        let mix = Mix {
            buffered: some(&mut rng, 20) + 2,
            direct: some(&mut rng, 20) + 2,
            read: rng.between(2, 15),
            fsync: some(&mut rng, 6),
            trim: some(&mut rng, 5),
            zero: some(&mut rng, 5),
            allocate: some(&mut rng, 4),
            resize: some(&mut rng, 2),
            close: some(&mut rng, 1),
            delete: some(&mut rng, 1),
            leave: 0,
        };
        let more = if is_crowded { 10 } else { 0 };
        let mix = Mix { buffered: mix.buffered + more, fsync: mix.fsync + more / 5, ..mix };
        let clean_blocks = if rare.chance(50) { rare.between(1, 24) as usize } else { 0 };
        let late_creations = rare.chance(50) && late_calls > 0;
        let mix = if late_creations { Mix { delete: mix.delete + 3, ..mix } } else { mix };
        // Callers give up soon, and what they gave up arrives all the same.
        let is_hasty = rare.chance(6);
        let mix = if is_hasty { Mix { resize: mix.resize + 3, ..mix } } else { mix };
        let late_calls = if is_hasty { late_calls.max(500) } else { late_calls };
        let hasty_io_ms = rare.between(150, 400);
        let hasty_call_ms = rare.between(15, 60);
        let hasty_slow = rare.between(20, 150);
        let slow_journal = slow_journal.filter(|_| !is_hasty);
        let hung_writes = if rare.chance(8) { rare.between(5, 200) } else { 0 };
        let flush_log_blocks = if rare.chance(25) { 0 } else { rare.between(1, 64) };
        let log_blocks_per_volume_max =
            if rare.chance(30) { rare.between(2, 16) } else { rare.between(17, 256) };
        let log_blocks_max = if rare.chance(20) { rare.between(2, 24) } else { 1_024 };
        let log_read_blocks = rare.between(1, 16) as usize;
        let log_dawdles = if rare.chance(20) { rare.between(50, 500) } else { 0 };
        let hasty_flushes = if rare.chance(30) { rare.between(50, 500) } else { 0 };
        let zero_writes = if rare.chance(30) { rare.between(50, 500) } else { 0 };
        let is_flushing = flush_log_blocks > 0 && rare.chance(50);
        let mix = if is_flushing { Mix { fsync: mix.fsync + 4, ..mix } } else { mix };
        let mut later = Rng::new(seed ^ LATER);
        // A flush that stands still while conversion is killed and comes back.
        let is_late = flush_log_blocks > 0 && later.chance(10);
        let is_lazy = flush_log_blocks > 0 && later.chance(if is_late { 50 } else { 8 });
        let log_dawdle_ms = if is_late { later.between(200, 3_000) } else { 100 };
        let log_dawdles = if is_late { later.between(100, 600) } else { log_dawdles };
        let soft = rng.between(2, 40);
        let mut plan = Self {
            stores,
            writebacks: rng.between(1, 2) as usize,
            capacity,
            volumes,
            workers: rng.between(1, 4) as usize,
            operations: rng.between(5, 40) as usize,
            cells_max: rng.between(1, 32),
            aligned: rng.below(101),
            mix,
            chaos,
            device,
            chaos_ms: rng.between(200, 2500),
            limits: Limits {
                lease_ms,
                io_end_life_max_ms: u64::from(lease_ms) * rng.between(2, 8),
                io_ends_per_volume_max: rng.between(2, 64) as usize,
                in_flight_blocks_max: rng.between(32, 4096),
                convert_batch_max: rng.between(1, 16) as usize,
                convert_blocks_max: rng.between(1, 64),
                drain_batches_max: rng.between(1, 4) as usize,
                change_chunks_max: rng.between(1, 4),
                fence_io_ends_max: rng.between(1, 8) as usize,
                punch_ranges_max: rng.between(1, 8) as usize,
                punch_blocks_max: rng.between(1, 64),
                punch_interval_ms: rng.between(1, 100),
                punch_run_blocks,
                punch_idle_ms,
                unpunched_blocks_max,
                reuse_blocks,
                log_blocks_per_volume_max,
                log_blocks_max,
                ended_max: rng.between(1, 64) as usize,
                search_runs_max: rng.between(1, 8) as usize,
                retry_after_ms: rng.between(1, 10) as u32,
                ..Limits::default()
            },
            gate: GateLimits {
                in_flight_max: rng.between(4, 64) as usize,
                seen_max: rng.between(4, 256) as usize,
                fenced_io_ends_max: rng.between(2, 64) as usize,
                fenced_volumes_max: 64,
                lease_margin_ms: rng.between(1, 50),
            },
            credit: CreditPolicy {
                low_blocks: rng.between(0, 16),
                high_blocks: rng.between(16, 64),
                step_blocks: rng.between(1, 32),
            },
            throttle: throttle::Limits {
                soft_bytes: soft * BLOCK_BYTES,
                hard_bytes: (soft + rng.between(8, 60)) * BLOCK_BYTES,
                delay_max_ms: rng.below(4),
            },
            sessions: SessionLimits {
                sessions_max: 256,
                window: rng.between(4, 64) as usize,
                results_kept: rng.between(0, 8) as usize,
                idle_min_ms: 600_000,
            },
            log: CacheLogOptions {
                segment_bytes: rng.between(16, 64) << 12,
                max_bytes: rng.between(512, 1024) << 12,
                sessions_max: 256,
            },
            journal_us: {
                let usual = Span(rng.between(1, 50), rng.between(50, 2000));
                slow_journal.unwrap_or(usual)
            },
            write_us: Span(1, rng.between(10, 1000)),
            read_us: Span(1, rng.between(10, 1000)),
            flush_us: Span(1, rng.between(10, 3000)),
            delay_us: Span(1, rng.between(10, 3000)),
            slow: if rng.chance(50) { rng.below(100) } else { 0 },
            slow_read: if rng.chance(50) { rng.below(300) } else { 0 },
            late_calls,
            check_permille: rng.between(5, 50),
            inputs_per_turn: rng.between(1, 32) as usize,
            io_timeout_ms: u64::from(lease_ms) * rng.between(2, 12),
            call_timeout_ms: rng.between(20, 300),
            retry_max_ms: rng.between(2, 60),
            reconnect_ms: rng.between(2, 60),
            confirm_ms: rng.between(2, 40),
            write_out_after_ms: rng.between(1, 200),
            write_outs: rng.between(1, 4) as usize,
            write_out_blocks: rng.between(1, 32),
            drain_ms: rng.between(20, 500),
            late_bios,
            rot_ms,
            map_entries: if rng.chance(20) { rng.below(6) as usize } else { 64 },
            learn_blocks: rng.between(1, 48),
            late_creations,
            clean_blocks,
            hung_writes,
            flush_log_blocks,
            log_read_blocks,
            log_dawdles,
            log_dawdle_ms,
            is_lazy,
            hasty_flushes,
            zero_writes,
            writeback_death_ms,
            write_around_blocks,
            around_patience_ms,
            clean_fails,
            shares_io_ends: false,
            rewrite_ms: 0,
            log_messages_max: usize::MAX,
            logs_ahead: 0,
            durable_writes: 0,
            reads_all: seed >= ANEW_FROM,
            near_end: 0,
            stops_ms: 0,
        };
        let mut leave = Rng::new(seed ^ LEAVE);
        if seed >= LEAVE_FROM && leave.chance(15) {
            plan.leave_volumes(&mut leave);
        }
        let mut anew = Rng::new(seed ^ ANEW);
        if seed >= ANEW_FROM {
            if plan.mix.leave > 0 && anew.chance(50) {
                // Openings are given up soon, and arrive while nobody has the volume.
                plan.late_calls = plan.late_calls.max(500);
                plan.call_timeout_ms = anew.between(15, 60);
                plan.slow = plan.slow.max(anew.between(20, 150));
            }
            // More than any io_end here has in one store.
            plan.gate.seen_max = plan.gate.seen_max.max(64);
            if anew.chance(30) {
                plan.near_end = anew.between(100, 700);
                plan.mix.resize += 2;
                plan.aligned /= 2;
                plan.volumes[0].growable = true;
                if anew.chance(40) && !plan.device.lies() {
                    (plan.volumes[0].in_place, plan.volumes[0].replicas) = (true, 1);
                }
            }
            plan.shares_io_ends = anew.chance(50);
            plan.rewrite_ms = if anew.chance(40) { anew.between(1, 100) } else { 0 };
            plan.log_messages_max = anew.between(1, 3) as usize;
            plan.durable_writes = if anew.chance(40) { anew.between(50, 1000) } else { 0 };
            plan.logs_ahead = if anew.chance(30) { anew.between(50, 1000) } else { 0 };
            plan.stops_ms = if anew.chance(15) { anew.between(30, 400) } else { 0 };
        }
        let mut news = Rng::new(seed ^ NEWS);
        if seed >= NEWS_FROM && news.chance(30) {
            plan.limits.listed_stores_per_s = news.between(100, 20_000);
        }
        let mut heap = Rng::new(seed ^ HEAP);
        if seed >= HEAP_FROM && heap.chance(25) {
            plan.heap_up(&mut heap);
        }
        if is_lazy {
            plan.write_out_after_ms = 3_600_000;
        }
        if is_hasty {
            plan.io_timeout_ms = hasty_io_ms;
            plan.call_timeout_ms = hasty_call_ms;
            plan.slow = plan.slow.max(hasty_slow);
        }
        plan
    }

    /// Volumes that are closed and left alone for a while, over two writebacks that die and take them from
    /// each other: what a dead owner's log holds, and calls that were on their way, then meet a volume
    /// that nobody has open.
    fn leave_volumes(&mut self, rng: &mut Rng) {
        self.writebacks = 2;
        self.mix.leave = rng.between(1, 8);
        self.mix.buffered += 10;
        self.chaos.takeover += rng.between(2, 10);
        if self.chaos.every_ms > 0 {
            self.chaos.every_ms = self.chaos.every_ms.min(rng.between(10, 100));
        }
        if rng.chance(50) {
            self.writeback_death_ms = rng.between(20, 300);
        }
        if rng.chance(50) {
            self.late_calls = self.late_calls.max(rng.between(100, 1000));
        }
    }

    /// Writes of some blocks each that lie over each other before any of them is written out, over two
    /// writebacks that die in the middle of it and take the volumes from each other: what was one write is
    /// visible as a whole or not at all, also where newer ones hide it.
    fn heap_up(&mut self, rng: &mut Rng) {
        self.writebacks = 2;
        for volume in &mut self.volumes {
            volume.in_place = false;
            volume.blocks = volume.blocks.min(rng.between(3, 8));
        }
        self.mix.buffered += rng.between(20, 60);
        self.mix.direct = rng.between(1, 3);
        self.cells_max = self.cells_max.max(rng.between(8, 20));
        self.write_around_blocks = 0;
        self.write_out_after_ms = rng.between(20, 300);
        self.write_out_blocks = self.write_out_blocks.min(rng.between(1, 8));
        self.writeback_death_ms = rng.between(30, 400);
        self.chaos.takeover += rng.between(2, 10);
        if self.chaos.every_ms > 0 {
            self.chaos.every_ms = self.chaos.every_ms.min(rng.between(10, 100));
        }
    }

    /// Stores with hardly more room than the volumes, processes that die and sessions that break, and
    /// data that is there already: what was converted unheard wants space that nobody has. Not drawn:
    /// too often an fsync then fails for want of space until something is trimmed (docs/TESTING.md).
    pub fn fill_up(&mut self, rng: &mut Rng) {
        for volume in &mut self.volumes {
            (volume.in_place, volume.growable) = (false, false);
            volume.blocks = volume.blocks.min(rng.between(2, 10));
        }
        let copies = self.volumes.iter().map(|volume| volume.blocks * u64::from(volume.replicas));
        self.capacity = copies.sum::<u64>().div_ceil(self.stores as u64) + rng.between(1, 8);
        self.chaos.every_ms = rng.between(10, 40);
        self.chaos.break_stream += rng.between(0, 20);
        self.chaos.kill += rng.between(5, 20);
        self.cells_max = self.cells_max.min(rng.between(4, 16));
        self.aligned = self.aligned.max(rng.between(50, 100));
        self.mix.fsync += rng.between(4, 20);
        self.mix.buffered += rng.between(10, 30);
        self.mix.direct = 1;
        self.operations += 30;
        self.zero_writes = self.zero_writes.max(rng.between(200, 600));
        self.flush_log_blocks = self.flush_log_blocks.max(rng.between(1, 16));
    }
}
