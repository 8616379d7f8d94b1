//! Arguments → configuration → agent → exit code.

use std::process::ExitCode;

use rkubelet::{
    agent::{self, AgentError},
    cli::{self, Command},
    config::HostFacts,
    telemetry,
};

/// Few threads: the agent waits far more than it computes.
const WORKER_THREADS: usize = 2;

fn main() -> ExitCode {
    // Both ring and others may be linked in some day; rustls must not have to choose.
    let _ = rustls::crypto::ring::default_provider().install_default();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            telemetry::report_failed_start(error.as_ref());
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let options = match cli::parse(std::env::args().skip(1))? {
        Command::Version { raw: false } => return print(&cli::version_line()),
        Command::Version { raw: true } => return print(&cli::version_info().to_string()),
        Command::Help => return print(&cli::help_text()),
        Command::Run(options) => *options,
    };
    for line in &options.deprecations {
        eprint_line(line)?;
    }
    let config = options.load(&HostFacts::read())?;
    let verbosity = telemetry::init_logging(&config.kubelet.logging);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKER_THREADS)
        .max_blocking_threads(64)
        .thread_name("rkubelet")
        .enable_all()
        .build()
        .map_err(AgentError::Runtime)?;
    let outcome = runtime.block_on(agent::run(config, verbosity));
    // Blocking calls that hang (a dead file system) must not hold the exit up.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    Ok(outcome?)
}

fn print(text: &str) -> Result<(), Box<dyn std::error::Error>> {
    use std::io::Write;
    Ok(writeln!(std::io::stdout(), "{text}")?)
}

fn eprint_line(text: &str) -> Result<(), Box<dyn std::error::Error>> {
    use std::io::Write;
    Ok(writeln!(std::io::stderr(), "{text}")?)
}
