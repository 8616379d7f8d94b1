//! The command line walked as Go's pflag walks it: `--flag value`, `--flag=value`, booleans only with `=`. Contract S-03.
//!
//! Arguments go in; a [`Command`] or the error for stderr comes out. Pure.

use crate::config::{Config, ConfigError, Flags, HostFacts, Override};

use super::flags::{FlagSpec, Kind, Target, find};
use super::values;

/// What the command line asks for.
#[derive(Debug)]
pub enum Command {
    /// Be the node agent.
    Run(Box<Options>),
    /// Print the version: the line kubeadm reads, or with `raw` everything. Exit 0.
    Version { raw: bool },
    /// Print [`super::help_text`]. Exit 0.
    Help,
}

/// A parsed command line.
#[derive(Debug, Default)]
pub struct Options {
    /// Settings without a configuration field.
    pub flags: Flags,
    /// Configuration fields that flags set; highest layer.
    pub overrides: Vec<Override>,
    /// Lines for stderr, each once, in the order of the flags.
    pub deprecations: Vec<String>,
    /// Every flag given, normalised, for `/flagz` and the log.
    pub given: Vec<(&'static str, String)>,
}

impl Options {
    /// Builds the configuration from files and flags.
    pub fn load(self, host: &HostFacts) -> Result<Config, ConfigError> {
        Config::load(self.flags, &self.overrides, host)
    }
}

/// What is wrong with a command line; exit 1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CliError {
    #[error("failed to parse kubelet flag: unknown flag: --{0}")]
    UnknownFlag(String),
    #[error("failed to parse kubelet flag: unknown shorthand flag: '{0}' in -{1}")]
    UnknownShorthand(char, String),
    #[error("failed to parse kubelet flag: flag needs an argument: {0}")]
    NeedsArgument(String),
    #[error("failed to parse kubelet flag: bad flag syntax: {0}")]
    BadSyntax(String),
    #[error("failed to parse kubelet flag: invalid argument {value:?} for {flag:?} flag: {reason}")]
    InvalidArgument { flag: String, value: String, reason: String },
    #[error("unknown command {0}")]
    UnknownCommand(String),
}

/// Parses the arguments after the program's name.
pub fn parse<I: IntoIterator<Item = String>>(arguments: I) -> Result<Command, CliError> {
    let mut parser = Parser::default();
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        if argument == "--" {
            parser.positional.extend(arguments.by_ref());
        } else if let Some(long) = argument.strip_prefix("--") {
            parser.long(&argument, long, &mut arguments)?;
        } else if argument.len() > 1 && argument.starts_with('-') {
            parser.short(&argument[1..], &mut arguments)?;
        } else {
            parser.positional.push(argument);
        }
    }
    if let Some(command) = parser.positional.first() {
        return Err(CliError::UnknownCommand(command.clone()));
    }
    Ok(match (parser.help, parser.version) {
        (true, _) => Command::Help,
        (false, Some(Version::Line)) => Command::Version { raw: false },
        (false, Some(Version::Raw)) => Command::Version { raw: true },
        (false, None) => Command::Run(Box::new(parser.options)),
    })
}

#[derive(Debug, Clone, Copy)]
enum Version {
    Line,
    Raw,
}

#[derive(Default)]
struct Parser {
    options: Options,
    positional: Vec<String>,
    help: bool,
    version: Option<Version>,
}

impl Parser {
    fn long(&mut self, argument: &str, long: &str, rest: &mut impl Iterator<Item = String>) -> Result<(), CliError> {
        if long.starts_with(['-', '=']) {
            return Err(CliError::BadSyntax(argument.to_owned()));
        }
        let (name, value) = match long.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (long, None),
        };
        let normal = name.replace('_', "-");
        match normal.as_str() {
            "help" => self.set_help(value.as_deref().unwrap_or("true")),
            "version" => self.set_version(value.as_deref().unwrap_or("true")),
            _ => {
                let spec = find(&normal).ok_or_else(|| CliError::UnknownFlag(name.to_owned()))?;
                let value = match (value, spec.kind) {
                    (Some(value), _) => value,
                    (None, Kind::Bool) => "true".to_owned(),
                    (None, _) => rest.next().ok_or_else(|| CliError::NeedsArgument(format!("--{name}")))?,
                };
                self.set(spec, &value)
            }
        }
    }

    /// `-v2`, `-v=2`, `-v 2`, `-h`: the only short flags.
    fn short(&mut self, shorts: &str, rest: &mut impl Iterator<Item = String>) -> Result<(), CliError> {
        let Some(first) = shorts.chars().next() else { return Ok(()) };
        let tail = &shorts[first.len_utf8()..];
        match (first, find("v")) {
            ('h', _) => {
                self.set_help(tail.strip_prefix('=').unwrap_or("true"))?;
                if tail.is_empty() || tail.starts_with('=') { Ok(()) } else { self.short(tail, rest) }
            }
            ('v', Some(spec)) => {
                let value = match tail.strip_prefix('=').unwrap_or(tail) {
                    "" if tail.is_empty() => {
                        rest.next().ok_or_else(|| CliError::NeedsArgument(format!("'v' in -{shorts}")))?
                    }
                    value => value.to_owned(),
                };
                self.set(spec, &value)
            }
            _ => Err(CliError::UnknownShorthand(first, shorts.to_owned())),
        }
    }

    fn set_help(&mut self, value: &str) -> Result<(), CliError> {
        self.help = values::parse_bool(value).map_err(|reason| invalid("-h, --help", value, reason))?;
        Ok(())
    }

    fn set_version(&mut self, value: &str) -> Result<(), CliError> {
        self.version = match value {
            "raw" => Some(Version::Raw),
            // Go reports another version of the same release when told so; this program has one.
            value if value.starts_with(super::KUBERNETES_VERSION) => None,
            value => {
                let shown = values::parse_bool(value).map_err(|reason| invalid("--version", value, reason))?;
                shown.then_some(Version::Line)
            }
        };
        Ok(())
    }

    fn set(&mut self, spec: &'static FlagSpec, text: &str) -> Result<(), CliError> {
        let shown = if spec.name == "v" { "-v, --v".to_owned() } else { format!("--{}", spec.name) };
        let before = match spec.target {
            Target::Field(path) => {
                let position = self.options.overrides.iter().position(|over| over.path == path);
                position.map(|position| self.options.overrides.remove(position).value)
            }
            Target::Flag(_) if spec.kind == Kind::Labels => serde_json::to_value(&self.options.flags.node_labels).ok(),
            Target::Flag(_) | Target::Nothing => None,
        };
        let value = values::parse(spec.kind, text, before).map_err(|reason| invalid(&shown, text, reason))?;
        match spec.target {
            Target::Field(path) => self.options.overrides.push(Override { path, value }),
            Target::Flag(set) => {
                set(&mut self.options.flags, &value).map_err(|reason| invalid(&shown, text, reason))?;
            }
            Target::Nothing => {}
        }
        if let Some(why) = spec.deprecated {
            self.options.deprecations.push(format!("Flag --{} has been deprecated, {why}", spec.name));
        }
        // Header values may be credentials.
        let given = if spec.kind == Kind::Headers { "<masked>" } else { text };
        self.options.given.push((spec.name, given.to_owned()));
        Ok(())
    }
}

fn invalid(flag: &str, value: &str, reason: String) -> CliError {
    CliError::InvalidArgument { flag: flag.to_owned(), value: value.to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use serde_json::json;

    use super::*;
    use crate::config::CloudProvider;

    fn command(line: &str) -> Result<Command, CliError> {
        parse(line.split_whitespace().map(str::to_owned))
    }

    fn options(line: &str) -> Options {
        match command(line) {
            Ok(Command::Run(options)) => *options,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn s03_errors_are_worded_as_upstream() {
        for (line, message) in [
            ("start", "unknown command start"),
            ("--nope", "failed to parse kubelet flag: unknown flag: --nope"),
            ("--no_pe=1", "failed to parse kubelet flag: unknown flag: --no_pe"),
            ("--fail-swap-on false", "unknown command false"),
            ("--config", "failed to parse kubelet flag: flag needs an argument: --config"),
            ("-v", "failed to parse kubelet flag: flag needs an argument: 'v' in -v"),
            ("-x1", "failed to parse kubelet flag: unknown shorthand flag: 'x' in -x1"),
            ("--=x", "failed to parse kubelet flag: bad flag syntax: --=x"),
            (
                "--port=x",
                "failed to parse kubelet flag: invalid argument \"x\" for \"--port\" flag: strconv.ParseInt: parsing \
                 \"x\": invalid syntax",
            ),
            (
                "-v=-1",
                "failed to parse kubelet flag: invalid argument \"-1\" for \"-v, --v\" flag: strconv.ParseUint: parsing \
                 \"-1\": invalid syntax",
            ),
        ] {
            assert_eq!(command(line).unwrap_err().to_string(), message, "{line}");
        }
    }

    #[test]
    fn s03_underscores_are_dashes() {
        let options = options("--max_pods=7 --kubeconfig /k --hostname_override N");
        assert_eq!(options.overrides, [Override { path: "maxPods", value: json!(7) }]);
        assert_eq!(options.flags.kubeconfig, Some(PathBuf::from("/k")));
        assert_eq!(options.flags.hostname_override, "N");
    }

    #[test]
    fn booleans_take_a_value_only_with_an_equals_sign() {
        let of = |line: &str| options(line).overrides[0].value.clone();
        assert_eq!(of("--fail-swap-on"), json!(true));
        assert_eq!(of("--fail-swap-on=false"), json!(false));
        assert_eq!(of("--fail-swap-on=F"), json!(false));
    }

    #[test]
    fn verbosity_in_all_spellings() {
        for line in ["-v2", "-v=2", "-v 2", "--v=2", "--v 2"] {
            assert_eq!(options(line).overrides, [Override { path: "logging.verbosity", value: json!(2) }], "{line}");
        }
    }

    #[test]
    fn s01_version_and_help() {
        assert!(matches!(command("--version"), Ok(Command::Version { raw: false })));
        assert!(matches!(command("--version=raw"), Ok(Command::Version { raw: true })));
        assert!(matches!(command("--version=false --max-pods 1"), Ok(Command::Run(_))));
        assert!(matches!(command("--help --version"), Ok(Command::Help)));
        assert!(matches!(command("-h"), Ok(Command::Help)));
        assert!(command("--help --nope").is_err());
    }

    #[test]
    fn deprecated_flags_say_so() {
        let given = options("--max-pods=7 --kubeconfig=/k --provider-id=kind://x");
        assert_eq!(
            given.deprecations,
            ["Flag --max-pods has been deprecated, This parameter should be set via the config file specified by the \
              Kubelet's --config flag. See \
              https://kubernetes.io/docs/tasks/administer-cluster/kubelet-config-file/ for more information."]
        );
    }

    #[test]
    fn s04_the_pause_image_flag_of_old_units_is_let_through() {
        let given = options("--pod-infra-container-image=registry.k8s.io/pause:3.9");
        assert!(given.overrides.is_empty());
        assert!(given.deprecations[0].starts_with("Flag --pod-infra-container-image has been deprecated, "));
    }

    #[test]
    fn repeated_flags_add_or_replace() {
        let given = options(
            "--node-labels=a=1 --node-labels=b=2 --port=1 --port=2 --cluster-dns=10.0.0.1 --cluster-dns=10.0.0.2",
        );
        assert_eq!(given.flags.node_labels.len(), 2);
        assert_eq!(given.overrides[0].value, json!(2));
        assert_eq!(given.overrides[1].value, json!(["10.0.0.1", "10.0.0.2"]));
    }

    #[test]
    fn s20_cloud_provider_is_empty_or_external() {
        assert_eq!(options("--cloud-provider=external").flags.cloud_provider, CloudProvider::External);
        assert!(command("--cloud-provider=aws").is_err());
    }

    #[test]
    fn header_values_are_not_kept_for_display() {
        let given = options("--manifest-url-header=Authorization:secret");
        assert!(!format!("{:?}", given.given).contains("secret"));
    }

    /// The command line of kind and kubeadm.
    #[test]
    fn kubeadm_and_kind_command_line() {
        let given = options(
            "--bootstrap-kubeconfig=/etc/kubernetes/bootstrap-kubelet.conf --kubeconfig=/etc/kubernetes/kubelet.conf \
             --config=/var/lib/kubelet/config.yaml --container-runtime-endpoint=unix:///run/containerd/containerd.sock \
             --node-ip=172.18.0.2 --node-labels= --provider-id=kind://docker/kind/kind-worker --runtime-cgroups=/system.slice/containerd.service",
        );
        assert_eq!(given.flags.config_file, Some(PathBuf::from("/var/lib/kubelet/config.yaml")));
        assert_eq!(given.overrides.len(), 2);
        assert_eq!(given.deprecations.len(), 1);
    }
}
