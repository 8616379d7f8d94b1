//! The two log formats and what a reader's options make of them. Pure: bytes in, bytes out.
//!
//! CRI: `<RFC3339Nano> <stdout|stderr> <P|F>[:tag…] <content>\n`; a record marked `P` is continued by the next one of its stream.
//! Docker JSON: one object with `log`, `stream`, `time` per line. The first line of a file decides (contract L-02).

use std::borrow::Cow;

use jiff::Timestamp;

/// What a reader wants (contract L-03).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LogOptions {
    /// Go on until the container stops.
    pub follow: bool,
    /// The last n records only.
    pub tail_lines: Option<u64>,
    /// Stop after so many bytes.
    pub limit_bytes: Option<u64>,
    /// Nothing older than this.
    pub since: Option<Timestamp>,
    /// Put the record's time, RFC 3339 with nine digits, before each line.
    pub timestamps: bool,
    pub stream: StreamChoice,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StreamChoice {
    #[default]
    All,
    Stdout,
    Stderr,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    More,
    /// The options are satisfied: nothing further will be written.
    Done,
}

/// A log whose first line is in neither format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("failed to get parse function: unsupported log format: {line:?}")]
pub(super) struct UnknownFormat {
    line: String,
}

/// A line longer than this is passed on in pieces, so that memory stays bounded whatever a runtime writes.
const LINE_BUFFER: usize = 64 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stream {
    Stdout,
    Stderr,
}

#[derive(Debug, Clone, Copy)]
enum Format {
    Cri,
    DockerJson,
}

/// A record without its content.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Head {
    at: Timestamp,
    stream: Stream,
    partial: bool,
}

/// Turns a log file's bytes, in pieces of any size, into what the reader wants.
pub(super) struct Decoder {
    options: LogOptions,
    format: Option<Format>,
    line: Vec<u8>,
    /// The record whose line outgrew the buffer; its content is passed on as it comes.
    open: Option<Head>,
    bytes_left: u64,
    records_left: Option<u64>,
    at_line_start: bool,
}

impl Decoder {
    pub fn new(options: LogOptions) -> Self {
        Self {
            options,
            format: None,
            line: Vec::new(),
            open: None,
            bytes_left: options.limit_bytes.unwrap_or(u64::MAX),
            // With follow, tailLines only chooses where to begin.
            records_left: options.tail_lines.filter(|_| !options.follow),
            at_line_start: true,
        }
    }

    /// Appends to `out`. After [`Flow::Done`] there is nothing more to push.
    pub fn push(&mut self, mut input: &[u8], out: &mut Vec<u8>) -> Result<Flow, UnknownFormat> {
        while !input.is_empty() && !self.done() {
            let (piece, ends) = match input.iter().position(|b| *b == b'\n') {
                Some(at) => (&input[..=at], true),
                None => (input, false),
            };
            input = &input[piece.len()..];
            if let Some(head) = self.open {
                self.continue_open(head, piece, ends, out);
                continue;
            }
            self.line.extend_from_slice(piece);
            if ends {
                self.complete(out)?;
            } else if self.line.len() > LINE_BUFFER {
                self.open_long_line(out)?;
            }
        }
        Ok(if self.done() { Flow::Done } else { Flow::More })
    }

    /// The file ended and nobody waits for more: a last line without an end counts as it is.
    pub fn finish(&mut self, out: &mut Vec<u8>) -> Result<(), UnknownFormat> {
        if !self.line.is_empty() && !self.done() {
            self.complete(out)?;
        }
        Ok(())
    }

    /// The file was replaced: what is left of an unfinished line will never be completed.
    pub fn restart(&mut self) {
        self.line.clear();
        self.open = None;
    }

    fn done(&self) -> bool {
        self.bytes_left == 0 || self.records_left == Some(0)
    }

    fn complete(&mut self, out: &mut Vec<u8>) -> Result<(), UnknownFormat> {
        let line = std::mem::take(&mut self.line);
        let parsed = match self.format()(&line) {
            Some(parsed) => Some(parsed),
            None => self.detect(&line)?,
        };
        if let Some((head, content)) = parsed {
            self.write(head, &content, out);
            self.count_record();
            self.at_line_start = content.is_empty() || content.ends_with(b"\n");
        }
        // Keeps the allocation for the next line.
        self.line = line;
        self.line.clear();
        Ok(())
    }

    fn format(&self) -> Parse {
        match self.format {
            Some(Format::Cri) => parse_cri,
            Some(Format::DockerJson) => parse_docker,
            None => |_| None,
        }
    }

    /// On the first line: which format. A later line that does not parse is passed over.
    fn detect<'a>(&mut self, line: &'a [u8]) -> Result<Option<Parsed<'a>>, UnknownFormat> {
        if self.format.is_some() {
            return Ok(None);
        }
        for (format, parse) in [(Format::Cri, parse_cri as Parse), (Format::DockerJson, parse_docker as Parse)] {
            if let Some(parsed) = parse(line) {
                self.format = Some(format);
                return Ok(Some(parsed));
            }
        }
        let shown = &line[..line.len().min(256)];
        Err(UnknownFormat { line: String::from_utf8_lossy(shown).into_owned() })
    }

    fn open_long_line(&mut self, out: &mut Vec<u8>) -> Result<(), UnknownFormat> {
        let line = std::mem::take(&mut self.line);
        let Some((head, content)) = parse_cri(&line) else {
            return Err(UnknownFormat { line: String::from_utf8_lossy(&line[..256]).into_owned() });
        };
        self.format = Some(Format::Cri);
        self.write(head, &content, out);
        self.at_line_start = false;
        self.open = Some(head);
        Ok(())
    }

    fn continue_open(&mut self, head: Head, piece: &[u8], ends: bool, out: &mut Vec<u8>) {
        let content = if ends && head.partial { &piece[..piece.len() - 1] } else { piece };
        self.write(head, content, out);
        if ends {
            self.open = None;
            self.at_line_start = !head.partial;
            self.count_record();
        }
    }

    fn count_record(&mut self) {
        if let Some(left) = &mut self.records_left {
            *left = left.saturating_sub(1);
        }
    }

    fn write(&mut self, head: Head, content: &[u8], out: &mut Vec<u8>) {
        let wanted = match self.options.stream {
            StreamChoice::All => true,
            StreamChoice::Stdout => head.stream == Stream::Stdout,
            StreamChoice::Stderr => head.stream == Stream::Stderr,
        };
        if !wanted || self.options.since.is_some_and(|since| head.at < since) {
            return;
        }
        if self.options.timestamps && self.at_line_start {
            let prefix = format!("{:.9} ", head.at);
            self.take(prefix.as_bytes(), out);
        }
        self.take(content, out);
    }

    fn take(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        let fits = usize::try_from(self.bytes_left).unwrap_or(usize::MAX).min(bytes.len());
        out.extend_from_slice(&bytes[..fits]);
        self.bytes_left -= fits as u64;
    }
}

/// A record with its content.
type Parsed<'a> = (Head, Cow<'a, [u8]>);
type Parse = for<'a> fn(&'a [u8]) -> Option<Parsed<'a>>;

fn parse_cri(line: &[u8]) -> Option<Parsed<'_>> {
    let mut fields = line.splitn(4, |b| *b == b' ');
    let at = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let stream = match fields.next()? {
        b"stdout" => Stream::Stdout,
        b"stderr" => Stream::Stderr,
        _ => return None,
    };
    let tags = fields.next()?;
    let content = fields.next()?;
    let partial = tags.split(|b| *b == b':').next() == Some(b"P");
    let content = if partial { content.strip_suffix(b"\n").unwrap_or(content) } else { content };
    Some((Head { at, stream, partial }, content.into()))
}

fn parse_docker(line: &[u8]) -> Option<Parsed<'_>> {
    #[derive(serde::Deserialize)]
    struct Entry {
        #[serde(default)]
        log: String,
        stream: String,
        time: Timestamp,
    }
    let entry: Entry = serde_json::from_slice(line).ok()?;
    let stream = match entry.stream.as_str() {
        "stdout" => Stream::Stdout,
        "stderr" => Stream::Stderr,
        _ => return None,
    };
    let head = Head { at: entry.time, stream, partial: !entry.log.ends_with('\n') };
    Some((head, entry.log.into_bytes().into()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LOG: &str = "2016-10-06T00:17:09.669794202Z stdout P log \n\
        2016-10-06T00:17:09.669794203Z stdout F one\n\
        2016-10-06T00:17:10.5Z stderr F two\n\
        2016-10-06T00:17:11Z stdout F:tag three  x\n";

    fn decode(log: &str, options: LogOptions, piece: usize) -> String {
        let (mut decoder, mut out) = (Decoder::new(options), Vec::new());
        for chunk in log.as_bytes().chunks(piece.max(1)) {
            if decoder.push(chunk, &mut out).unwrap() == Flow::Done {
                return String::from_utf8(out).unwrap();
            }
        }
        decoder.finish(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn l02_partial_records_are_joined_and_tags_are_tolerated() {
        assert_eq!(decode(LOG, LogOptions::default(), 1000), "log one\ntwo\nthree  x\n");
    }

    #[test]
    fn l03_options() {
        let all = LogOptions::default();
        let since = "2016-10-06T00:17:10.5Z".parse().unwrap();
        let cases = [
            (
                LogOptions { timestamps: true, ..all },
                "2016-10-06T00:17:09.669794202Z log one\n2016-10-06T00:17:10.500000000Z two\n2016-10-06T00:17:11.000000000Z three  x\n",
            ),
            (LogOptions { limit_bytes: Some(5), ..all }, "log o"),
            (LogOptions { limit_bytes: Some(25), timestamps: true, ..all }, "2016-10-06T00:17:09.66979"),
            (LogOptions { tail_lines: Some(2), ..all }, "log one\n"),
            (LogOptions { tail_lines: Some(0), ..all }, ""),
            (LogOptions { tail_lines: Some(0), follow: true, ..all }, "log one\ntwo\nthree  x\n"),
            (LogOptions { since: Some(since), ..all }, "two\nthree  x\n"),
            (LogOptions { stream: StreamChoice::Stderr, ..all }, "two\n"),
            (LogOptions { stream: StreamChoice::Stdout, ..all }, "log one\nthree  x\n"),
        ];
        for (options, want) in cases {
            assert_eq!(decode(LOG, options, 7), want, "{options:?}");
        }
    }

    #[test]
    fn l02_docker_json_and_unknown_formats() {
        let docker = "{\"log\":\"content 1\\n\",\"stream\":\"stdout\",\"time\":\"2016-10-20T18:39:20.57606443Z\"}\n";
        assert_eq!(decode(docker, LogOptions::default(), 1000), "content 1\n");
        let mut decoder = Decoder::new(LogOptions::default());
        let error = decoder.push(b"what is this\n", &mut Vec::new()).unwrap_err();
        assert_eq!(error.to_string(), "failed to get parse function: unsupported log format: \"what is this\\n\"");
        // After the format is known, a broken line is passed over.
        assert_eq!(decode(&format!("{LOG}garbage\n{LOG}"), LogOptions::default(), 50).matches("two").count(), 2);
    }

    #[test]
    fn l02_unfinished_last_line_is_shown_at_the_end() {
        let log = "2016-10-06T00:17:11Z stdout F no end";
        assert_eq!(decode(log, LogOptions::default(), 5), "no end");
    }

    #[test]
    fn lines_beyond_the_buffer_pass_in_pieces() {
        let long = "x".repeat(3 * LINE_BUFFER);
        for tag in ["F", "P"] {
            let log = format!("2016-10-06T00:17:11Z stdout {tag} {long}\n2016-10-06T00:17:12Z stdout F end\n");
            let (mut decoder, mut out) = (Decoder::new(LogOptions::default()), Vec::new());
            for chunk in log.as_bytes().chunks(1000) {
                decoder.push(chunk, &mut out).unwrap();
                assert!(decoder.line.len() <= LINE_BUFFER + 1000);
            }
            let end = if tag == "F" { "\n" } else { "" };
            assert_eq!(String::from_utf8(out).unwrap(), format!("{long}{end}end\n"));
        }
    }

    proptest! {
        #[test]
        fn the_size_of_the_pieces_does_not_matter(piece in 1usize..200, limit in proptest::option::of(1u64..80)) {
            let options = LogOptions { limit_bytes: limit, timestamps: true, ..LogOptions::default() };
            prop_assert_eq!(decode(LOG, options, piece), decode(LOG, options, 10_000));
        }
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut decoder = Decoder::new(LogOptions::default());
            let mut out = Vec::new();
            let _ = decoder.push(&bytes, &mut out).map(|_| decoder.finish(&mut out));
        }
    }
}
