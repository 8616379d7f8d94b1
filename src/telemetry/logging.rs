//! Log lines on stderr as the Go kubelet writes them: klog's text, or component-base's JSON. Contract S-24.
//!
//! `tracing` events go in; one line each comes out, unbuffered. How much is said follows klog's verbosity, which may
//! change while running (`PUT /debug/flags/v`):
//!
//! | `-v` | this program | its libraries |
//! |---|---|---|
//! | 0 to 3 | error, warn, info | error, warn |
//! | 4, 5 | and debug | and info |
//! | 6, 7 | and trace | and info |
//! | 8, 9 | all | and debug |
//! | 10 and above | all | all |
//!
//! `--vmodule` sets the verbosity of single source files by the name of the file without `.rs`.

use std::fmt;
use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::Layer as _;
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields, MakeWriter};
use tracing_subscriber::layer::{Context, Filter, SubscriberExt as _};
use tracing_subscriber::registry::LookupSpan;

use crate::config::{Logging, VModuleItem};
use crate::time::{Clock, SystemClock};

/// The verbosity in force; clones share it.
#[derive(Debug, Clone)]
pub struct Verbosity {
    level: Arc<AtomicU32>,
    per_file: Arc<[VModuleItem]>,
}

impl Verbosity {
    fn new(level: u32, per_file: &[VModuleItem]) -> Self {
        Self { level: Arc::new(AtomicU32::new(level)), per_file: per_file.into() }
    }

    /// klog's `-v`.
    pub fn get(&self) -> u32 {
        self.level.load(Ordering::Relaxed)
    }

    /// Changes what is logged from now on.
    pub fn set(&self, level: u32) {
        self.level.store(level, Ordering::Relaxed);
        tracing::callsite::rebuild_interest_cache();
    }

    fn shows(&self, metadata: &Metadata<'_>) -> bool {
        let stem = file_name(metadata).strip_suffix(".rs").unwrap_or_default();
        let of_file = self.per_file.iter().find(|item| matches_glob(&item.file_pattern, stem));
        let level = of_file.map_or_else(|| self.get(), |item| item.verbosity);
        *metadata.level() <= level_filter(level, metadata.target())
    }
}

/// The table in this module's header.
fn level_filter(verbosity: u32, target: &str) -> LevelFilter {
    let own = target.split("::").next() == Some("rkubelet");
    match (own, verbosity) {
        (true, 0..=3) | (false, 4..=7) => LevelFilter::INFO,
        (true, 4..=5) | (false, 8..=9) => LevelFilter::DEBUG,
        (false, 0..=3) => LevelFilter::WARN,
        _ => LevelFilter::TRACE,
    }
}

/// `*` for any text, `?` for one character.
fn matches_glob(pattern: &str, text: &str) -> bool {
    let Some(first) = pattern.chars().next() else { return text.is_empty() };
    let rest = &pattern[first.len_utf8()..];
    let mut tails = text.char_indices().map(|(at, c)| &text[at + c.len_utf8()..]);
    match first {
        '*' => matches_glob(rest, text) || tails.any(|tail| matches_glob(rest, tail)),
        '?' => tails.next().is_some_and(|tail| matches_glob(rest, tail)),
        _ => text.strip_prefix(first).is_some_and(|tail| matches_glob(rest, tail)),
    }
}

impl<S> Filter<S> for Verbosity {
    fn enabled(&self, metadata: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        self.shows(metadata)
    }

    fn callsite_enabled(&self, metadata: &'static Metadata<'static>) -> Interest {
        if self.shows(metadata) { Interest::always() } else { Interest::never() }
    }
}

/// How a line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// `I1121 10:15:02.123456    1234 worker.rs:12] "Message" key="value"`.
    Klog,
    /// `{"ts":…,"caller":"worker.rs:12","msg":"Message","v":0,"key":"value"}`.
    Json,
}

#[derive(Clone)]
struct Format {
    form: Form,
    zone: TimeZone,
    clock: Arc<dyn Clock>,
}

impl Format {
    fn new(form: Form, zone: TimeZone, clock: Arc<dyn Clock>) -> Self {
        Self { form, zone, clock }
    }

    fn now(&self) -> Timestamp {
        self.clock.now().wall
    }
}

/// Starts logging for the whole process. A second call changes nothing. The answer steers the verbosity.
pub fn init_logging(logging: &Logging) -> Verbosity {
    let verbosity = Verbosity::new(logging.verbosity, &logging.vmodule);
    let form = if logging.format == "json" { Form::Json } else { Form::Klog };
    let format = Format::new(form, TimeZone::system(), Arc::new(SystemClock));
    let installed = tracing::subscriber::set_global_default(subscriber(format, verbosity.clone(), std::io::stderr));
    if installed.is_err() {
        tracing::warn!("Logging was already set up");
    }
    verbosity
}

fn subscriber<W>(format: Format, verbosity: Verbosity, writer: W) -> impl Subscriber + Send + Sync
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let lines = tracing_subscriber::fmt::layer()
        .fmt_fields(format.clone())
        .event_format(format)
        .with_writer(writer)
        .with_filter(verbosity);
    tracing_subscriber::registry().with(lines)
}

/// The line of a start that failed, before or without logging: `E… "command failed" err="…"` on stderr.
pub fn report_failed_start(error: &dyn std::error::Error) {
    let format = Format::new(Form::Klog, TimeZone::system(), Arc::new(SystemClock));
    let mut line = klog_header(Level::ERROR, &format, "main.rs", 0);
    line.push_str("\"command failed\"");
    push_klog_value(&mut line, "err", &Value::Text(with_causes(error)));
    line.push('\n');
    // Nobody is left to tell when stderr is gone.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// The error's text, then each cause that its text does not already contain.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let of_cause = error.to_string();
        if !text.contains(&of_cause) {
            text.push_str(": ");
            text.push_str(&of_cause);
        }
        cause = error.source();
    }
    text
}

/// A field's value: text is quoted, the rest is as it is in JSON.
enum Value {
    Text(String),
    Bare(String),
}

/// The fields of an event or span; the message apart.
#[derive(Default)]
struct Fields {
    message: String,
    values: Vec<(&'static str, Value)>,
}

impl Fields {
    fn push(&mut self, field: &Field, value: Value) {
        // klog's key for errors.
        let name = if field.name() == "error" { "err" } else { field.name() };
        self.values.push((name, value));
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let text = format!("{value:?}");
        if field.name() == "message" {
            self.message = text;
        } else {
            self.push(field, Value::Text(text));
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message = value.to_owned();
        } else {
            self.push(field, Value::Text(value.to_owned()));
        }
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.push(field, Value::Text(with_causes(value)));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.push(field, Value::Bare(value.to_string()));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.push(field, Value::Bare(value.to_string()));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.push(field, Value::Bare(value.to_string()));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.push(
            field,
            if value.is_finite() { Value::Bare(value.to_string()) } else { Value::Text(value.to_string()) },
        );
    }
}

fn file_name<'m>(metadata: &Metadata<'m>) -> &'m str {
    let path = metadata.file().unwrap_or("unknown");
    path.rsplit('/').next().unwrap_or(path)
}

fn klog_header(level: Level, format: &Format, file: &str, line: u32) -> String {
    let severity = match level {
        Level::ERROR => 'E',
        Level::WARN => 'W',
        _ => 'I',
    };
    let at = Zoned::new(format.now(), format.zone.clone());
    format!("{severity}{} {:7} {file}:{line}] ", at.strftime("%m%d %H:%M:%S%.6f"), std::process::id())
}

fn push_klog_value(line: &mut String, name: &str, value: &Value) {
    line.push(' ');
    line.push_str(name);
    match value {
        Value::Bare(text) => {
            line.push('=');
            line.push_str(text);
        }
        // klog's form of a text with several lines.
        Value::Text(text) if text.contains('\n') => {
            line.push_str("=<");
            for part in text.lines() {
                line.push_str("\n\t");
                line.push_str(part);
            }
            line.push_str("\n >");
        }
        Value::Text(text) => line.push_str(&format!("={text:?}")),
    }
}

fn push_json_value(line: &mut String, name: &str, value: &Value) {
    line.push(',');
    line.push_str(&json_text(name));
    line.push(':');
    match value {
        Value::Bare(text) => line.push_str(text),
        Value::Text(text) => line.push_str(&json_text(text)),
    }
}

fn json_text(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

impl Format {
    fn push_values(&self, line: &mut String, values: &[(&'static str, Value)]) {
        for (name, value) in values {
            match self.form {
                Form::Klog => push_klog_value(line, name, value),
                Form::Json => push_json_value(line, name, value),
            }
        }
    }

    fn start_of_line(&self, metadata: &Metadata<'_>, message: &str) -> String {
        let (file, line) = (file_name(metadata), metadata.line().unwrap_or_default());
        match self.form {
            Form::Klog => {
                format!("{}{message:?}", klog_header(*metadata.level(), self, file, line))
            }
            Form::Json => {
                let millis = self.now().as_nanosecond() as f64 / 1e6;
                let caller = json_text(&format!("{file}:{line}"));
                let mut text = format!("{{\"ts\":{millis:.4},\"caller\":{caller},\"msg\":{}", json_text(message));
                // Errors carry no verbosity.
                match *metadata.level() {
                    Level::ERROR => {}
                    Level::WARN | Level::INFO => text.push_str(",\"v\":0"),
                    Level::DEBUG => text.push_str(",\"v\":4"),
                    Level::TRACE => text.push_str(",\"v\":6"),
                }
                text
            }
        }
    }
}

impl<'w> FormatFields<'w> for Format {
    fn format_fields<R: RecordFields>(&self, mut writer: Writer<'w>, fields: R) -> fmt::Result {
        let mut found = Fields::default();
        fields.record(&mut found);
        let mut text = String::new();
        self.push_values(&mut text, &found.values);
        writer.write_str(&text)
    }
}

impl<S, N> FormatEvent<S, N> for Format
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let mut line = self.start_of_line(event.metadata(), &fields.message);
        for span in ctx.event_scope().into_iter().flat_map(|scope| scope.from_root()) {
            if let Some(values) = span.extensions().get::<FormattedFields<N>>() {
                line.push_str(&values.fields);
            }
        }
        self.push_values(&mut line, &fields.values);
        line.push_str(if self.form == Form::Json { "}\n" } else { "\n" });
        writer.write_str(&line)
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Mutex;

    use super::*;
    use crate::time::Now;

    /// Always the same time.
    struct Stopped;

    impl Clock for Stopped {
        fn now(&self) -> Now {
            Now { mono: tokio::time::Instant::now(), wall: "2026-11-21T10:15:02.123456789Z".parse().unwrap() }
        }
    }

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Lines {
        fn take(&self) -> String {
            String::from_utf8(std::mem::take(&mut *self.0.lock().unwrap())).unwrap()
        }
    }

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl<'w> MakeWriter<'w> for Lines {
        type Writer = Self;

        fn make_writer(&'w self) -> Self {
            self.clone()
        }
    }

    fn logged(form: Form, verbosity: u32, say: impl FnOnce(&Verbosity, &Lines)) -> String {
        let (lines, verbosity) = (Lines::default(), Verbosity::new(verbosity, &[]));
        let format = Format::new(form, TimeZone::UTC, Arc::new(Stopped));
        tracing::subscriber::with_default(subscriber(format, verbosity.clone(), lines.clone()), || {
            say(&verbosity, &lines)
        });
        lines.take()
    }

    #[test]
    fn s24_klog_text() {
        let text = logged(Form::Klog, 0, |_, _| {
            let error = io::Error::other("no \"way\"");
            tracing::error!(%error, code = 3, ok = true, "It failed");
        });
        let line = line!() - 2;
        let pid = std::process::id();
        assert_eq!(
            text,
            format!(
                "E1121 10:15:02.123456 {pid:7} logging.rs:{line}] \"It failed\" err=\"no \\\"way\\\"\" code=3 ok=true\n"
            )
        );
    }

    #[test]
    fn s24_several_lines_are_set_apart() {
        let text = logged(Form::Klog, 0, |_, _| tracing::warn!(output = "a\nb", "Said"));
        assert!(text.starts_with('W') && text.ends_with("\"Said\" output=<\n\ta\n\tb\n >\n"), "{text}");
    }

    #[test]
    fn s24_json() {
        let text = logged(Form::Json, 0, |_, _| {
            let span = tracing::info_span!("pod", pod = "default/a");
            let _entered = span.enter();
            tracing::info!(count = 2, name = "a\"b", "Done");
        });
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["ts"], serde_json::json!(1_795_256_102_123.456_8));
        assert_eq!((&value["msg"], &value["v"]), (&"Done".into(), &0.into()));
        assert_eq!((&value["pod"], &value["count"], &value["name"]), (&"default/a".into(), &2.into(), &"a\"b".into()));
        assert!(value["caller"].as_str().unwrap().starts_with("logging.rs:"));
    }

    #[test]
    fn s24_verbosity_changes_while_running() {
        logged(Form::Klog, 2, |verbosity, lines| {
            let say = || tracing::debug!("Detail");
            say();
            assert_eq!(lines.take(), "");
            verbosity.set(4);
            say();
            assert!(lines.take().contains("Detail"));
            verbosity.set(0);
            say();
            assert_eq!(lines.take(), "");
        });
    }

    #[test]
    fn verbosity_table() {
        for (verbosity, own, library) in [
            (0, LevelFilter::INFO, LevelFilter::WARN),
            (3, LevelFilter::INFO, LevelFilter::WARN),
            (4, LevelFilter::DEBUG, LevelFilter::INFO),
            (6, LevelFilter::TRACE, LevelFilter::INFO),
            (8, LevelFilter::TRACE, LevelFilter::DEBUG),
            (10, LevelFilter::TRACE, LevelFilter::TRACE),
        ] {
            assert_eq!(level_filter(verbosity, "rkubelet::pod_worker"), own);
            assert_eq!(level_filter(verbosity, "hyper::client"), library);
        }
        assert!(matches_glob("work*", "worker") && matches_glob("w?rker", "worker") && !matches_glob("work", "worker"));
    }
}
