//! The apiserver source: LIST and WATCH of the pods bound to this node (contract P-01, N-23).
