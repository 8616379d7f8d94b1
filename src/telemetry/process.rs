//! `process_*`: memory, CPU, descriptors and start time of this process, read from /proc/self at each scrape.

use procfs::process::{LimitValue, Process};
use procfs::{CurrentSI, WithCurrentSystemInfo};
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Counter, Error, Gauge};

/// What it reads is in bytes and seconds. A value that /proc does not give keeps its last reading.
pub(super) struct ProcessCollector {
    cpu_seconds: Counter,
    resident_bytes: Gauge,
    virtual_bytes: Gauge,
    open_fds: Gauge,
    max_fds: Gauge,
    start_seconds: Gauge,
}

impl ProcessCollector {
    pub(super) fn new() -> Result<Self, Error> {
        Ok(Self {
            cpu_seconds: Counter::new("process_cpu_seconds_total", "Total user and system CPU time spent in seconds.")?,
            resident_bytes: Gauge::new("process_resident_memory_bytes", "Resident memory size in bytes.")?,
            virtual_bytes: Gauge::new("process_virtual_memory_bytes", "Virtual memory size in bytes.")?,
            open_fds: Gauge::new("process_open_fds", "Number of open file descriptors.")?,
            max_fds: Gauge::new("process_max_fds", "Maximum number of open file descriptors.")?,
            start_seconds: Gauge::new(
                "process_start_time_seconds",
                "Start time of the process since unix epoch in seconds.",
            )?,
        })
    }

    fn read(&self) -> procfs::ProcResult<()> {
        let process = Process::myself()?;
        let stat = process.stat()?;
        let ticks = procfs::ticks_per_second() as f64;
        let cpu = (stat.utime + stat.stime) as f64 / ticks;
        self.cpu_seconds.inc_by((cpu - self.cpu_seconds.get()).max(0.0));
        self.resident_bytes.set(stat.rss_bytes().get() as f64);
        self.virtual_bytes.set(stat.vsize as f64);
        self.open_fds.set(process.fd_count()? as f64);
        if let LimitValue::Value(limit) = process.limits()?.max_open_files.soft_limit {
            self.max_fds.set(limit as f64);
        }
        if self.start_seconds.get() == 0.0 {
            let boot = procfs::KernelStats::current()?.btime as f64;
            self.start_seconds.set(boot + stat.starttime as f64 / ticks);
        }
        Ok(())
    }

    fn parts(&self) -> [&dyn Collector; 6] {
        [
            &self.cpu_seconds,
            &self.resident_bytes,
            &self.virtual_bytes,
            &self.open_fds,
            &self.max_fds,
            &self.start_seconds,
        ]
    }
}

impl Collector for ProcessCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.parts().into_iter().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        if let Err(error) = self.read() {
            tracing::debug!(%error, "Reading /proc/self for metrics failed");
        }
        self.parts().into_iter().flat_map(Collector::collect).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_process_is_measured() {
        let collector = ProcessCollector::new().unwrap();
        assert_eq!(collector.collect().len(), 6);
        assert!(collector.resident_bytes.get() > 100_000.0);
        assert!(collector.open_fds.get() >= 3.0 && collector.max_fds.get() >= collector.open_fds.get());
        assert!(collector.start_seconds.get() > 1_600_000_000.0);
    }
}
