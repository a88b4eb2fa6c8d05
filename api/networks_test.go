package api_test

import (
	"context"
	"errors"
	"net/http"
	"net/netip"
	"testing"

	"usernet/api"
	"usernet/api/client"
	"usernet/network"
)

// fakeNetworks are a Set's, and members of whatever is asked for.
type fakeNetworks struct{ *network.Set }

func (f fakeNetworks) Create(_ context.Context, cfg network.Config) (network.Network, error) {
	return f.Set.Create(cfg, nil)
}

func (f fakeNetworks) Remove(_ context.Context, name string) error { return f.Set.Remove(name) }

func (f fakeNetworks) Attach(_ context.Context, name string, r api.AttachRequest) (api.Attached, error) {
	m, err := f.Join(name, network.Request{
		Name: r.Name, Aliases: r.Aliases, IPv4: r.IPv4, IPv6: r.IPv6, MAC: r.MAC, Ifname: r.Ifname, Path: r.Path,
		NetNS: network.NetNS{Dev: 4, Inode: uint64(len(r.Path))},
	})
	return api.Attached{Member: m, Socket: "/x.sock"}, err
}

func (f fakeNetworks) Detach(_ context.Context, name, member string) error {
	_, err := f.Leave(name, member)
	return err
}

func TestNetworks(t *testing.T) {
	path, _ := serve(t, nil, func(c *api.Config) { c.Networks = fakeNetworks{network.New()} })
	c := client.New(path)
	defer c.Close()
	ctx := t.Context()
	refused := func(what string, err error, status int, code string) {
		t.Helper()
		var e *api.Error
		if !errors.As(err, &e) || e.Status != status || e.Code != code {
			t.Errorf("%s: %v, want %d %s", what, err, status, code)
		}
	}
	n, err := c.CreateNetwork(ctx, network.Config{Name: "web", Internal: true})
	if err != nil || n.Name != "web" || !n.Internal || !n.Subnet.IsValid() {
		t.Fatalf("created %+v: %v", n, err)
	}
	_, err = c.CreateNetwork(ctx, network.Config{Name: "web"})
	refused("a second web", err, http.StatusConflict, api.CodeConflict)
	_, err = c.CreateNetwork(ctx, network.Config{Name: "Web"})
	refused("a bad name", err, http.StatusBadRequest, api.CodeBadRequest)
	if all, err := c.Networks(ctx); err != nil || len(all) != 1 || all[0].Name != "web" {
		t.Errorf("list: %+v, %v", all, err)
	}
	_, err = c.Network(ctx, "nope/../x")
	refused("no such network", err, http.StatusNotFound, api.CodeNotFound)

	a, err := c.Attach(ctx, "web", api.AttachRequest{Path: "/run/netns/a", Name: "a", MAC: network.MAC{2, 0, 0, 0, 0, 1}})
	if err != nil || a.Member.Name != "a" || a.Member.MAC.String() != "02:00:00:00:00:01" || a.Socket != "/x.sock" {
		t.Errorf("attached %+v: %v", a, err)
	}
	_, err = c.Attach(ctx, "web", api.AttachRequest{Path: "/run/netns/bb", Name: "a"})
	refused("a second a", err, http.StatusConflict, api.CodeConflict)
	_, err = c.Attach(ctx, "nope", api.AttachRequest{Path: "/run/netns/bb", Name: "b"})
	refused("join to nothing", err, http.StatusNotFound, api.CodeNotFound)
	refused("remove with a member", c.RemoveNetwork(ctx, "web"), http.StatusConflict, api.CodeConflict)
	if err := c.Detach(ctx, "web", "a"); err != nil {
		t.Error(err)
	}
	refused("detach twice", c.Detach(ctx, "web", "a"), http.StatusNotFound, api.CodeNotFound)
	if err := c.RemoveNetwork(ctx, "web"); err != nil {
		t.Error(err)
	}
	_, err = c.CreateNetwork(ctx, network.Config{Name: "full", Subnet: netip.MustParsePrefix("10.1.0.0/30"), NoIPv6: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Attach(ctx, "full", api.AttachRequest{Path: "/a", Name: "a"}); err != nil {
		t.Fatal(err)
	}
	_, err = c.Attach(ctx, "full", api.AttachRequest{Path: "/bb", Name: "b"})
	refused("no address left", err, http.StatusConflict, api.CodeExhausted)
}
