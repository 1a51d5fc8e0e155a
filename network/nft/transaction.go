package nft

import (
	"errors"
	"fmt"
	"io"

	"github.com/google/nftables"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const (
	// ElementsPerMessage keeps the list of elements of a message below the 64 KiB of a
	// netlink attribute, with the longest chain names in it.
	ElementsPerMessage = 200
	// socketBuffer is the size of the socket's send buffer. A large transaction must fit;
	// the kernel uses the memory only while it needs it.
	socketBuffer = 64 << 20
)

// Transaction collects changes of one table that the kernel applies atomically. Errors of
// encoding are kept and reported by Socket.Commit.
//
// The library encodes the transaction but does not send it: it would make the kernel
// acknowledge every message and return every rule, which takes longer than the change
// itself. It also does not encode all that rules need; see conntrack.go.
type Transaction struct {
	conn     *nftables.Conn
	Table    *nftables.Table
	sets     uint32 // numbers the sets of the transaction
	messages []netlink.Message
	errs     []error
}

// Begin returns an empty transaction on a table.
func Begin(table string) (*Transaction, error) {
	t := &Transaction{Table: &nftables.Table{Name: table, Family: nftables.TableFamilyINet}}
	var err error
	t.conn, err = nftables.New(nftables.WithTestDial(func(m []netlink.Message) ([]netlink.Message, error) {
		t.messages = append(t.messages, m...)
		return nil, io.EOF // no answer
	}))
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	return t, nil
}

// Recreate makes the transaction start with an empty table.
func (t *Transaction) Recreate() {
	t.Remove()
	t.conn.AddTable(t.Table)
}

// Remove removes the table, if it exists.
func (t *Transaction) Remove() {
	t.conn.AddTable(t.Table) // so that removing it cannot fail
	t.conn.DelTable(t.Table)
}

// AddSet adds a set with elements.
func (t *Transaction) AddSet(s nftables.Set, elements []nftables.SetElement) {
	t.sets++
	// An ID that is unique within the transaction is enough. For the ID zero, the library
	// increments a counter that it does not guard.
	s.Table, s.ID = t.Table, t.sets
	if err := t.conn.AddSet(&s, nil); err != nil {
		t.errs = append(t.errs, fmt.Errorf("add set %s: %w", s.Name, err))
		return
	}
	t.AddElements(s, elements)
}

// AddElements adds elements to a set.
func (t *Transaction) AddElements(s nftables.Set, elements []nftables.SetElement) {
	t.change("fill", s, elements, t.conn.SetAddElements)
}

// DeleteElements removes elements from a set.
func (t *Transaction) DeleteElements(s nftables.Set, elements []nftables.SetElement) {
	t.change("empty", s, elements, t.conn.SetDeleteElements)
}

func (t *Transaction) change(what string, s nftables.Set, elements []nftables.SetElement, do func(*nftables.Set, []nftables.SetElement) error) {
	s.Table = t.Table
	for len(elements) > 0 {
		n := min(len(elements), ElementsPerMessage)
		if err := do(&s, elements[:n]); err != nil {
			t.errs = append(t.errs, fmt.Errorf("%s set %s: %w", what, s.Name, err))
		}
		elements = elements[n:]
	}
}

// refill replaces the elements of a set of the table.
func (t *Transaction) refill(s Set) {
	ref := s.In(t.Table)
	t.conn.FlushSet(ref)
	t.AddElements(*ref, s.Elements)
}

// DeleteSet removes a set.
func (t *Transaction) DeleteSet(name string) {
	t.conn.DelSet(&nftables.Set{Table: t.Table, Name: name})
}

// AddChain adds a chain without its rules, which may jump to chains that are added later.
func (t *Transaction) AddChain(c Chain) {
	t.conn.AddChain(&nftables.Chain{Name: c.Name, Table: t.Table, Type: c.Type, Hooknum: c.Hook, Priority: c.Priority})
}

// SetChains creates chains, or replaces the rules of existing ones.
func (t *Transaction) SetChains(chains []Chain) {
	for _, c := range chains { // all of them first: rules may jump to any
		t.AddChain(c)
		t.FlushChain(c.Name)
	}
	for _, c := range chains {
		t.AddRules(c.Name, c.Rules)
	}
}

// AddRules appends rules to a chain.
func (t *Transaction) AddRules(chainName string, rules []Rule) {
	ref := &nftables.Chain{Name: chainName, Table: t.Table}
	for _, r := range rules {
		t.conn.AddRule(&nftables.Rule{
			Table: t.Table, Chain: ref, Exprs: r.Exprs,
			UserData: userdata.AppendString(nil, userdata.TypeComment, TrimComment(r.Comment)),
		})
	}
}

// maxComment is the kernel's limit for the comment of a rule, less its framing.
const maxComment = 250

// TrimComment shortens a comment to the kernel's limit.
func TrimComment(s string) string {
	if len(s) > maxComment {
		return s[:maxComment-3] + "..."
	}
	return s
}

// FlushChain removes the rules of a chain.
func (t *Transaction) FlushChain(name string) {
	t.conn.FlushChain(&nftables.Chain{Name: name, Table: t.Table})
}

// DeleteChain removes a chain, which must have no rules.
func (t *Transaction) DeleteChain(name string) {
	t.conn.DelChain(&nftables.Chain{Name: name, Table: t.Table})
}

// encode returns the messages of the transaction; none if it changes nothing.
func (t *Transaction) encode() ([]netlink.Message, error) {
	if err := errors.Join(append(t.errs, t.conn.Flush())...); err != nil {
		return nil, fmt.Errorf("encode change of nftables table %s: %w", t.Table.Name, err)
	}
	for i := range t.messages {
		h := &t.messages[i].Header
		h.Sequence, h.PID = 0, 0 // assigned when sent
		h.Flags &^= netlink.Acknowledge | netlink.Echo
		if h.Type == unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWRULE {
			finishConntrack(t.messages[i].Data)
		}
	}
	if n := len(t.messages); n > 0 {
		// Errors come in order, and the acknowledgement of the last change (the message
		// after it ends the transaction) comes only without an error.
		t.messages[n-2].Header.Flags |= netlink.Acknowledge
	}
	return t.messages, nil
}

// Commit sends the transaction through a temporary socket; see Socket.
func (t *Transaction) Commit() error {
	var s Socket
	return errors.Join(s.Commit(t), s.Close())
}

// Socket is a connection to the kernel that stays open from one transaction to the
// next; the zero Socket is ready for use. Closing it waits until the kernel has
// cleared away what transactions removed, which takes 10 ms.
type Socket struct{ conn *netlink.Conn }

// Commit sends a transaction and waits for the kernel's result.
func (s *Socket) Commit(t *Transaction) error {
	messages, err := t.encode()
	if err != nil || len(messages) == 0 {
		return err
	}
	if s.conn == nil {
		conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
		if err != nil {
			return fmt.Errorf("open nftables: %w", err)
		}
		if err := conn.SetWriteBuffer(socketBuffer); err != nil {
			return errors.Join(fmt.Errorf("open nftables: %w", err), conn.Close())
		}
		s.conn = conn
	}
	if _, err = s.conn.SendMessages(messages); err == nil {
		_, err = s.conn.Receive()
	}
	if err != nil {
		// Further messages about a failed transaction must not be read as the result of the
		// next one.
		return errors.Join(fmt.Errorf("change nftables table %s: %w", t.Table.Name, err), s.Close())
	}
	return nil
}

// Close closes the connection. The next commit opens another.
func (s *Socket) Close() error {
	if s.conn == nil {
		return nil
	}
	err := s.conn.Close()
	s.conn = nil
	return err
}
