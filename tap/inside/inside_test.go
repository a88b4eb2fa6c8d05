package inside_test

import (
	"context"
	"testing"

	"golang.org/x/sys/unix"

	"usernet/tap/inside"
	"usernet/tap/netns"
	"usernet/tap/taptest"
)

func TestMain(m *testing.M) { taptest.MainHere(m, inside.Ops()) }

func TestSmoke(t *testing.T) {
	for _, owner := range taptest.Owners {
		t.Run(owner.String(), func(t *testing.T) {
			space := taptest.NewNS(t, owner)
			ns, err := netns.Open(netns.Config{PID: space.PID, Helper: true})
			if err != nil {
				t.Fatal(err)
			}
			defer ns.Close()
			k, err := inside.Open(t.Context(), ns, inside.Config{IPv6: true})
			if err != nil {
				t.Fatal(err)
			}
			t.Log(k.Transparent(false), k.Transparent(true))
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- k.Run(ctx) }()
			fd, err := k.Socket(ctx, inside.Kind{})
			if err != nil {
				t.Fatal(err)
			}
			unix.Close(fd)
			t.Log(k.Listening(ctx))
			cancel()
			<-done
			if err := k.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}
