// Package pki makes and keeps the certificates and keys of a cluster: the
// authorities, the leaf certificates they sign, and bare signing keys.
//
// Everything is idempotent and safe against a crash at any point: a key is
// durable before a certificate for it is made, an authority is durable before
// it signs anything, and each Ensure function repairs what an interrupted
// earlier call left. Keys are ECDSA P-256.
//
// It decides nothing about who may have which certificate: names, groups and
// addresses are the caller's. It may be imported by server, agent and main.
package pki
