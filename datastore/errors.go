package datastore

import (
	"errors"

	"kedge/datastore/peers"
)

var (
	// ErrInUse means that another process has the data directory open.
	ErrInUse = errors.New("the data directory is in use by another process")

	// ErrNotServing means that the store is not open yet, or has stopped.
	ErrNotServing = errors.New("the datastore is not serving")

	// ErrFailed means that an error occurred after which the store must not go on, such as a failed write to the disk.
	// Acknowledged writes are on disk; the process has to start again.
	ErrFailed = errors.New("the datastore failed")

	// ErrNoSpace means that the database file has reached its quota, so that writes are refused.
	ErrNoSpace = errors.New("the datastore has reached its quota")

	// ErrNoLeader means that this member is cut off from the majority, or that no majority exists.
	ErrNoLeader = errors.New("the datastore has no leader")

	// ErrCorrupt means that the members hold different data, so that etcd refuses to serve it.
	ErrCorrupt = errors.New("the members of the datastore do not hold the same data")

	// ErrDamaged means that files of the store are missing, or differ from what was written. The start has changed nothing.
	ErrDamaged = errors.New("the datastore is damaged")

	// ErrRemoved means that this member was removed from the cluster. Its directory is kept and cannot be opened again;
	// SetAside makes room for a new member in its place. The other members go on.
	ErrRemoved = errors.New("this member was removed from the cluster")

	// ErrNoPeers means that Config.Peer is not set, so that the store can have only one member.
	ErrNoPeers = peers.ErrNoPort

	// ErrMemberExists means that a member of this name is alive.
	ErrMemberExists = errors.New("a member of this name is alive")

	// ErrNoMember means that no member has this name.
	ErrNoMember = errors.New("there is no such member")

	// ErrQuorum means that the change would leave the store without a majority of its members alive.
	ErrQuorum = errors.New("the datastore would lose its majority")
)
