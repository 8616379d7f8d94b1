//! The pod's view of the network: DNS config, host name, hosts file (contract P-54, P-55, P-56). Pure, but for writing the hosts file.
