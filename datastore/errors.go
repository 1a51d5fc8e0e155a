package datastore

import "errors"

var (
	// ErrInUse means that another process has the data directory open.
	ErrInUse = errors.New("the data directory is in use by another process")

	// ErrNotServing means that the store is not open: not yet, or no more.
	ErrNotServing = errors.New("the datastore is not serving")

	// ErrFailed means that the store met a fault after which it must not go on, such as a disk that refuses
	// to write. What was acknowledged before is on disk; the process has to start again.
	ErrFailed = errors.New("the datastore failed")

	// ErrNoSpace means that the database file has reached its quota, so that writes are refused.
	ErrNoSpace = errors.New("the datastore has reached its quota")

	// ErrNoLeader means that this member is cut off from the majority, or that there is none.
	ErrNoLeader = errors.New("the datastore has no leader")

	// ErrCorrupt means that the members do not hold the same data, so that etcd refuses to serve any.
	ErrCorrupt = errors.New("the members of the datastore do not hold the same data")

	// ErrRemoved means that this member was removed from the cluster. Its directory is as it was, and is refused
	// from now on; SetAside makes room for a new member in its place. The other members go on.
	ErrRemoved = errors.New("this member was removed from the cluster")

	// ErrNoPeers means that Config.Peer is not set, so that the store can have only one member.
	ErrNoPeers = errors.New("this datastore has no peer port, so it cannot have other members")

	// ErrMemberExists means that the name belongs to a member that is alive.
	ErrMemberExists = errors.New("a member of this name is alive")

	// ErrNoMember means that there is no member of the name.
	ErrNoMember = errors.New("there is no such member")

	// ErrQuorum means that the change would leave the store without a majority of members that are alive.
	ErrQuorum = errors.New("the datastore would lose its majority")
)
