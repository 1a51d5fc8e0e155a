package beacon

import (
	"log/slog"
	"testing"
)

func TestPacket(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	packet := NewSender([]byte("authority"), 6443, nil, log).packet
	if port, ok := parse(packet, tag([]byte("authority"))); !ok || port != 6443 {
		t.Errorf("a beacon is read as %d, %v", port, ok)
	}
	if _, ok := parse(packet, tag([]byte("another"))); ok {
		t.Error("the beacon of another cluster's server is taken")
	}
	for what, p := range map[string][]byte{
		"short": packet[:size-1], "long": append(append([]byte{}, packet...), 0), "empty": nil,
		"without a port": NewSender([]byte("authority"), 0, nil, log).packet,
		"of others":      append([]byte("kedge sarver"), packet[len(magic):]...),
	} {
		if _, ok := parse(p, tag([]byte("authority"))); ok {
			t.Errorf("a packet that is %s is taken", what)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(NewSender([]byte("a"), 6443, nil, slog.New(slog.DiscardHandler)).packet)
	f.Fuzz(func(t *testing.T, packet []byte) {
		if port, ok := parse(packet, tag([]byte("a"))); ok && (port == 0 || len(packet) != size) {
			t.Errorf("%x is taken", packet)
		}
	})
}
