// Package upgrades carries out objects of kind Upgrade (kedge.io/v1): upgrades of the whole cluster for those who steer it by
// git. It defines the kind, and on the server that leads it starts the same rollout as "kedge upgrade --all".
//
// It upgrades no node itself: package appliance/remote has the rollout, and package appliance the upgrade of a node. Only
// package assembly imports it.
package upgrades
