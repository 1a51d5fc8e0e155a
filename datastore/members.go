package datastore

import (
	"context"
	"errors"
	"net/netip"
)

// Members returns the members of the store, as a majority has agreed on them, or as far as this one knows if
// there is none: then with the members and with ErrNoLeader.
func (s *Store) Members(ctx context.Context) ([]Member, error) {
	return nil, errors.ErrUnsupported
}

// Admit makes room for a new member of the given name, which is reached at addresses, and returns what it
// needs to start. It begins as a learner, which changes nothing for the others until it is there and has caught
// up; from then on it has a vote.
//
// It may be called on any member. A name of a member that has never started, or is dead, is taken over: the
// dead one is removed first, if a majority stays alive (else ErrQuorum). A living one is ErrMemberExists.
// A member that was admitted and never came does not stand in the way of others.
func (s *Store) Admit(ctx context.Context, name string, addresses []netip.AddrPort) (Admission, error) {
	return Admission{}, errors.ErrUnsupported
}

// Remove removes the member of the given name, alive or dead. It refuses with ErrQuorum if the members that
// remain could not decide anything any more. The removed member finds out, and its Run returns ErrRemoved; that
// may be this one.
func (s *Store) Remove(ctx context.Context, name string) error { return errors.ErrUnsupported }

// SetAddresses tells the other members that this machine has moved. It returns at once.
func (s *Store) SetAddresses(addresses []netip.Addr) {}

// HandOver makes another member the leader, if this one is and there is one that can be. It does nothing, and
// succeeds, if this one does not lead or is alone. Run does it by itself before it stops.
func (s *Store) HandOver(ctx context.Context) error { return errors.ErrUnsupported }
